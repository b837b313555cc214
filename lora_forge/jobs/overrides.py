"""What one row asks for beside its prompt, as a layer of a run config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeGuard

from lora_forge.config.run import Choice, RunConfig, collect_run_config
from lora_forge.jobs.columns import KINDS
from lora_forge.options import Text, plain

NONE: Mapping[str, Any] = {}  # shared by all rows that ask for nothing else


def read_overrides(given: Mapping[str, Any], *, typed: bool) -> tuple[Mapping[str, Any], str | None]:
    """The layer for keys of a run config and options (`loss.KEY`), and what is wrong with it.

    typed: the values are JSON's own; otherwise they are text, to be parsed. What was asked for before is shared, not
    made again. An option's text stays a `Text`, since its type is known only with its plugin.
    """
    return _read(json.dumps(given, sort_keys=True), typed) if given else (NONE, None)


@lru_cache(maxsize=4096)
def _read(given: str, typed: bool) -> tuple[Mapping[str, Any], str | None]:
    names: dict[str, Any] = {}
    options: dict[str, dict[str, Any]] = {}
    for key, value in json.loads(given).items():
        kind, dot, option = key.partition(".")
        fit: Any = value if typed else Text(value)
        if dot:
            options.setdefault(kind, {})[option] = fit
        elif key in KINDS and _are_options(fit):
            options[key] = {**fit.get("options", {}), **options.get(key, {})}
        else:
            names[key] = fit
    added = {kind: {"options": some} for kind, some in options.items() if kind in names}
    config, problems = collect_run_config([names, added])
    own = [problem for problem in problems if problem.key.partition(".")[0] in names]
    if own:
        return NONE, "; ".join(map(str, own))
    layer = {key: _value(config, key) for key in names}
    # The job says whose options these are.
    layer |= {kind: {"options": some} for kind, some in options.items() if some and kind not in names}
    return _in_order(layer) or NONE, None


def _are_options(value: Any) -> TypeGuard[dict[str, Any]]:
    """Whether a plugin's table names none, and so adds to the options of the job's."""
    return isinstance(value, dict) and set(value) <= {"options"} and isinstance(value.get("options", {}), dict)


def _value(config: RunConfig, key: str) -> Any:
    value = getattr(config, key)
    if key == "loss":
        return [_term(one) for one in value]
    return _table(value) if isinstance(value, Choice) else plain(value)


def _term(choice: Choice) -> dict[str, Any]:
    schedule = {} if choice.schedule == "constant" else {"schedule": choice.schedule}
    return {**_table(choice), "weight": choice.weight, **schedule}


def _table(choice: Choice) -> dict[str, Any]:
    return {"name": choice.name, "options": dict(choice.options)}


def _in_order(value: Any) -> Any:
    """Every mapping in the order of its keys, so that what is equal is written equal."""
    if isinstance(value, Mapping):
        return {key: _in_order(value[key]) for key in sorted(value)}
    return [_in_order(item) for item in value] if isinstance(value, list) else value
