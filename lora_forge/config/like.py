"""`run --like`: the run config of the run that made a file, from the file's own metadata, and what differs now."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_forge.config.run import RunConfig
from lora_forge.errors import ConfigError, LoraFileError, Problem
from lora_forge.files.header import read_metadata
from lora_forge.plugins import BUILTIN, Registry

RECORD_KEY = "lora_forge"
RECORD_FORMAT = 1
_SCALARS = ("prompt", "prompt_2", "model", "base_model", "rank", "alpha", "iterations", "l2", "seed", "dtype", "inert")
_STRENGTHS = ("strength", "target_shift")
_KINDS = ("initializer", "optimizer", "saver")
IN_MEMORY = "in memory"


@dataclass(frozen=True)
class Earlier:
    """The run that made a file: its record, the versions it ran with, and its run config as a layer."""

    path: Path
    run: Mapping[str, Any]
    versions: Mapping[str, str]
    layer: Mapping[str, Any]


def read_earlier(path: Path) -> Earlier:
    """What a file's metadata tells of the run that made it. No plugin is loaded for what is written there.

    Raises LoraFileError when the file cannot be read, or holds no record of a run.
    """
    metadata = read_metadata(path)
    if RECORD_KEY not in metadata:
        raise LoraFileError(f"{path.name} holds no record of a run; was it made by lora-forge?")
    try:
        record = json.loads(metadata[RECORD_KEY])
        if record["format"] != RECORD_FORMAT:
            raise LoraFileError(f"{path.name}: its record has format {record['format']!r}, this release reads 1")
        run = dict(record["run"])
        layer = _layer(run)
        versions = dict(record["versions"])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise LoraFileError(f"{path.name}: its record of the run is damaged ({type(error).__name__})") from error
    if date := metadata.get("modelspec.date"):
        layer["date"] = date
    return Earlier(path, run, versions, layer)


def check_plugins(earlier: Earlier, config: RunConfig, registry: Registry) -> None:
    """Raises ConfigError naming every plugin that the earlier run used, this one would, and that is not here."""
    recorded = {(kind, _name(one)): one for kind, one in _supplied(earlier.run)}
    chosen = [("loss", choice) for choice in config.loss] + [(kind, getattr(config, kind)) for kind in _KINDS]
    problems = []
    for kind, choice in chosen:
        one = recorded.get((kind, choice.name))
        if one is None or registry.candidates(kind, choice.name):
            continue
        if str(one["version"]).startswith("sha256:"):
            version = _one_line(one["version"])
            hint = f"it came from the plugin file {one['module']!r} ({version}): give it again with --plugin"
        else:
            origin = _one_line(f"{one['distribution']} {one['version']}")
            hint = f"it came from {origin}, which is not installed here"
        problems.append(Problem(kind, f"{one['name']!r} is missing; {hint}{registry.suspects(choice.name)}"))
    if earlier.run.get("init_from") and config.init_from is None:
        start = _one_line(str(earlier.run["init_from"]))
        problems.append(Problem("init_from", f"it started from {start}: give it with --init-from"))
    if problems:
        raise ConfigError(f"like {earlier.path.name}", problems)


def differences(earlier: Earlier, run: Mapping[str, Any], versions: Mapping[str, str]) -> list[str]:
    """What differs between the earlier run and this one, one line each; empty if the file should come out the same."""
    return [*_differences("", earlier.run, run), *_differences("", earlier.versions, versions)]


def _layer(run: Mapping[str, Any]) -> dict[str, Any]:
    layer = {key: run[key] for key in _SCALARS if run[key] is not None}
    layer |= {key: run[key] for key in _STRENGTHS if run[key] is not None}
    if layer.get("base_model") == IN_MEMORY:
        del layer["base_model"]
    layer["loss"] = [
        {"name": _name(one), "weight": one["weight"], "options": dict(one["options"])} for one in run["loss"]
    ]
    layer |= {kind: {"name": _name(run[kind]), "options": dict(run[kind]["options"])} for kind in _KINDS}
    layer["backend_options"] = {key: value for key, value in run["backend"]["options"].items() if value is not None}
    for _, one in _supplied(run):
        one["version"], one["module"]  # what `check_plugins` reads: a record without them is damaged
    return layer


def _supplied(run: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield from (("loss", one) for one in run["loss"])
    yield from ((kind, run[kind]) for kind in _KINDS)


def _name(one: Mapping[str, Any]) -> str:
    name, distribution = str(one["name"]), str(one["distribution"])
    return name if distribution == BUILTIN else f"{distribution}:{name}"


def _differences(where: str, before: Any, now: Any) -> Iterator[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*before, *now]):
            yield from _differences(f"{where}.{key}".lstrip("."), before.get(key), now.get(key))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, (one, other) in enumerate(zip(before, now, strict=True)):
            yield from _differences(f"{where}[{index}]" if len(before) > 1 else where, one, other)
    elif before != now:
        yield f"{_one_line(where)} was {_short(before)}, now {_short(now)}"


def _one_line(text: str) -> str:
    """Text of a file that may be anybody's: what would break the line, or steer a terminal, is escaped."""
    return text if text.isprintable() else repr(text)


def _short(value: Any) -> str:
    text = "absent" if value is None else _one_line(str(value))
    return text if len(text) <= 80 else f"{text[:77]}…"
