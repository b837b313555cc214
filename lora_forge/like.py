"""`run --like`: the run config of the run that made a file, from the file's own metadata, and what differs now."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from lora_forge.config.model import shipped_names
from lora_forge.config.run import Choice, RunConfig
from lora_forge.errors import ConfigError, LoraFileError, Problem, printable
from lora_forge.files.header import read_metadata
from lora_forge.files.names import RECORD_KEY
from lora_forge.plan import IN_MEMORY
from lora_forge.plugins import BUILTIN, Registry, Supplied
from lora_forge.saving import RECORD_FORMAT

_SCALARS = (
    *("prompt", "prompt_2", "model", "base_model", "rank", "alpha", "iterations", "l2", "seed", "dtype", "inert"),
    *("strength", "target_shift"),
)
_KINDS = ("initializer", "optimizer")


@dataclass(frozen=True)
class Earlier:
    """The run that made a file: its record, the versions it ran with, and its run config as a layer."""

    path: Path
    run: Mapping[str, Any]
    versions: Mapping[str, str]
    layer: Mapping[str, Any]

    def layer_below(self, layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The layer for use below others: a model given there comes with a base model of its own."""
        other = any(layer.get("model", self.run["model"]) != self.run["model"] for layer in layers)
        return {key: value for key, value in self.layer.items() if not (other and key == "base_model")}


def read_earlier(path: Path) -> Earlier:
    """What a file's metadata tells of the run that made it. No plugin is loaded for what is written there.

    Raises LoraFileError when the file cannot be read, or holds no record of a run.
    """
    adapters = sorted(path.glob("*/adapter_model.safetensors")) if path.is_dir() else []  # each holds the record
    metadata = read_metadata(adapters[0] if adapters else path)
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
    layer["preview"] = "modelspec.thumbnail" in metadata
    layer |= {"date": metadata.get("modelspec.date"), "device": record.get("device", "auto")}
    return Earlier(path, run, versions, layer)


def check_earlier(earlier: Earlier, config: RunConfig, registry: Registry) -> None:
    """Raises ConfigError naming all that this run would use of the earlier one and that is not here, or not whole."""
    recorded = {(kind, _name(one)): one for kind, one in _supplied(earlier.run)}
    chosen = [(kind, choice) for kind in ("loss", "saver") for choice in getattr(config, kind)]
    chosen += [(kind, getattr(config, kind)) for kind in _KINDS]
    same_model = config.model == earlier.run["model"]
    if same_model:
        chosen.append(("backend", Choice(_name(earlier.run["backend"]), config.backend_options)))
    problems = []
    for kind, choice in chosen:
        one = recorded.get((kind, choice.name))
        if one is None:
            continue
        if registry.candidates(kind, choice.name):
            problems += _paths_to_give_again(one, choice, registry.resolve(kind, choice.name))
        else:
            problems.append(Problem(kind, f"{one['name']!r} is missing; {_origin(one, registry)}"))
    if same_model and config.model not in shipped_names() and not Path(config.model).is_file():
        hint = "came from a model config file, which has to be given again with --model"
        problems.append(Problem("model", f"{config.model!r} {hint}"))
    if earlier.run.get("init_from") and config.init_from is None:
        start = printable(str(earlier.run["init_from"]))
        problems.append(Problem("init_from", f"it started from {start}: give it with --init-from"))
    if problems:
        raise ConfigError(f"like {earlier.path.name}", problems)


def _origin(one: Mapping[str, Any], registry: Registry) -> str:
    """Where something that is missing came from, and what to do about it."""
    origin = printable(f"{one['distribution']} {one['version']}")
    if str(one["version"]).startswith("sha256:"):
        version = printable(one["version"])
        return f"it came from the plugin file {one['module']!r} ({version}): give it again with --plugin"
    here = [plugin for plugin in registry.plugins if plugin.distribution == one["distribution"]]
    if not here:
        hidden = " or not named in LORA_FORGE_PLUGINS" if "LORA_FORGE_PLUGINS" in os.environ else ""
        return f"it came from {origin}, which is not installed here{hidden}"
    broken = registry.suspects(_name(one))
    return f"it came from {origin}; here is {here[0].version}, which " + (
        f"is broken{broken}" if broken else "lacks it"
    )


def _paths_to_give_again(one: Mapping[str, Any], choice: Choice, supplied: Supplied) -> list[Problem]:
    """Options that are paths, and still as the file has them: of a path a file keeps the last part only."""
    hints = get_type_hints(supplied.spec.options)
    kept = [
        name
        for name, value in choice.options.items()
        if value and value is one["options"].get(name) and _holds_path(hints.get(name))
    ]
    words = "is a path, of which a file keeps only the last part: give it again"
    return [Problem(f"{one['name']}.{name}", f"{choice.options[name]!r} {words}") for name in kept]


def _holds_path(hint: Any) -> bool:
    return hint is Path or any(map(_holds_path, get_args(hint)))


def differences(earlier: Earlier, run: Mapping[str, Any], config: RunConfig, versions: Mapping[str, str]) -> list[str]:
    """What differs between the earlier run and this one, one line each; empty if the file should come out the same."""
    besides = {key: earlier.layer[key] for key in ("date", "device")}
    same = [one for one in run["saver"] if _name(one) == _name(earlier.run["saver"])]  # others write other files
    return [
        *record_differences("", {"dtype_out": "float32", **earlier.run}, {**run, "saver": (same or run["saver"])[0]}),
        *record_differences("", besides, {"date": config.date, "device": config.device}),
        *record_differences("", earlier.versions, versions),
    ]


def _layer(run: Mapping[str, Any]) -> dict[str, Any]:
    layer = {key: run[key] for key in _SCALARS if run[key] is not None}
    layer["dtype_out"] = run.get("dtype_out", "float32")  # what files without it have
    layer |= {key: run[key] for key in ("tf32", "keep", "stop_when") if run.get(key)}
    if layer.get("base_model") == IN_MEMORY:
        del layer["base_model"]
    layer["loss"] = [_term(one) for one in run["loss"]]
    layer |= {kind: {"name": _name(run[kind]), "options": dict(run[kind]["options"])} for kind in (*_KINDS, "saver")}
    layer["backend_options"] = {key: value for key, value in run["backend"]["options"].items() if value is not None}
    for _, one in _supplied(run):
        one["version"], one["module"]  # what `check_earlier` reads: a record without them is damaged
    return layer


def _term(one: Mapping[str, Any]) -> dict[str, Any]:
    schedule = {"schedule": one["schedule"]} if "schedule" in one else {}
    return {"name": _name(one), "weight": one["weight"], **schedule, "options": dict(one["options"])}


def _supplied(run: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield from (("loss", one) for one in run["loss"])
    yield from ((kind, run[kind]) for kind in (*_KINDS, "saver", "backend"))


def _name(one: Mapping[str, Any]) -> str:
    name, distribution = str(one["name"]), str(one["distribution"])
    return name if distribution == BUILTIN else f"{distribution}:{name}"


def record_differences(where: str, before: Any, now: Any) -> Iterator[str]:
    """What differs between two JSON-ready values, one line each; `where` is the key that they stand under."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*before, *now]):
            yield from record_differences(f"{where}.{key}".lstrip("."), before.get(key), now.get(key))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, (one, other) in enumerate(zip(before, now, strict=True)):
            yield from record_differences(f"{where}[{index}]" if len(before) > 1 else where, one, other)
    elif before != now:
        yield f"{printable(where)} was {_short(before)}, now {_short(now)}"


def _short(value: Any) -> str:
    text = "absent" if value is None else printable(str(value))
    return text if len(text) <= 80 else f"{text[:77]}…"
