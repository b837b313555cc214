"""Model configs: `model_config/<name>_config.json`."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_forge.contracts import TargetLayer
from lora_forge.errors import ConfigError, ModelError, Problem, nearest

SUFFIX = "_config.json"
TARGETS, DIMENSIONS = "target_layers_", "layer_dimensions_"
_SCALARS = ("backend", "base_model", "iterations", "learning_rate", "regularization_strength")


@dataclass(frozen=True)
class ModelConfig:
    """Which layers of which base model get a LoRA, and of what rank.

    targets: `{component: (layer, …)}`, full canonical paths or suffixes such as `q_proj`.
    dimensions: `{component: {layer: (out, in)}}`, keyed the same two ways.
    backend: None for the one that recognizes the base model. digest: sha256 of the canonical JSON.
    """

    name: str
    backend: str | None
    base_model: str | None
    lora_rank: int
    lora_alpha: float
    iterations: int | None
    learning_rate: float | None
    regularization_strength: float | None
    targets: Mapping[str, tuple[str, ...]]
    dimensions: Mapping[str, Mapping[str, tuple[int, int]]]
    digest: str


def shipped_folder() -> Path:
    """The folder with the model configs that ship with the package."""
    installed = Path(__file__).parent.parent / "model_config"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "model_config"


def shipped_names() -> list[str]:
    """Names of the model configs that ship with the package."""
    return sorted(path.name.removesuffix(SUFFIX) for path in shipped_folder().glob(f"*{SUFFIX}"))


def read_model_config(name_or_path: str) -> ModelConfig:
    """A model config by shipped name, or from a path to a JSON file.

    Raises ModelError for an unknown name or missing file, ConfigError with every mistake in the file.
    """
    path = shipped_folder() / f"{name_or_path}{SUFFIX}"
    if name_or_path not in shipped_names():
        path = Path(name_or_path)
        if path.suffix != ".json" and not os.path.isfile(path):
            beside = f"{name_or_path}{SUFFIX}"
            meant = f"; did you mean {beside!r}, which is here?" if os.path.isfile(beside) else None
            raise ModelError(f"unknown model {name_or_path!r}{meant or nearest(name_or_path, shipped_names())}")
        if not os.path.isfile(path):
            raise ModelError(f"model config {name_or_path!r} does not exist")
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text, object_pairs_hook=_no_duplicates)
        return parse_model_config(data, name=path.name.removesuffix(SUFFIX).removesuffix(".json"), source=path.name)
    except ValueError as error:
        raise ConfigError(path.name, [Problem("", f"not valid JSON: {error}")]) from error
    except RecursionError as error:
        raise ConfigError(path.name, [Problem("", "nested too deeply to be a model config")]) from error
    except OSError as error:
        raise ModelError(f"model config {name_or_path!r} cannot be read: {error.strerror}") from error


def parse_model_config(data: Any, *, name: str, source: str) -> ModelConfig:
    """Check a model config's own content; `expand_targets` checks it against the architecture.

    Raises ConfigError with every mistake; its `usable` is the config without them.
    """
    if not isinstance(data, dict):
        raise ConfigError(source, [Problem("", "a model config is a JSON object")])
    problems: list[Problem] = []
    for key in ("lora_rank", "lora_alpha"):
        if key not in data:
            problems.append(Problem(key, "is missing"))
    if not any(key.startswith(TARGETS) for key in data):
        problems.append(Problem(f"{TARGETS}…", "no component has target layers"))
    _check_keys(data, problems)
    targets = {c: _targets(data, c, problems) for c in _components(data, TARGETS)}
    dimensions = {c: _dimensions(data, c, problems) for c in _components(data, DIMENSIONS)}
    for component, layers in targets.items():
        if layers and component not in dimensions:
            problems.append(Problem(f"{DIMENSIONS}{component}", "is missing"))
    config = ModelConfig(
        name=name,
        backend=_text(data, "backend", problems),
        base_model=_text(data, "base_model", problems),
        lora_rank=_integer(data, "lora_rank", 1, problems) or 1,
        lora_alpha=_number(data, "lora_alpha", problems, above_zero=True) or 1.0,
        iterations=_integer(data, "iterations", 0, problems),
        learning_rate=_number(data, "learning_rate", problems, above_zero=True),
        regularization_strength=_number(data, "regularization_strength", problems, above_zero=False),
        targets=targets,
        dimensions=dimensions,
        digest=hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest(),
    )
    if problems:
        raise ConfigError(source, problems, usable=config)
    return config


def expand_targets(
    config: ModelConfig, architecture: Mapping[str, Mapping[str, tuple[int, int]]], *, rank: int
) -> list[TargetLayer]:
    """Every target layer, in the architecture's order, each once, its dimensions checked.

    Raises ConfigError naming layers that do not exist, have no dimensions or wrong ones, and one that is
    smaller than the rank.
    """
    problems: list[Problem] = []
    layers: list[TargetLayer] = []
    for component in dict.fromkeys((*config.targets, *config.dimensions)):
        real = architecture.get(component)
        if real is not None:
            layers += _expand_component(config, component, real, problems)
        elif config.targets.get(component) or config.dimensions.get(component):
            key = f"{TARGETS if config.targets.get(component) else DIMENSIONS}{component}"
            problems.append(Problem(key, f"the model has no such component{nearest(component, architecture)}"))
    small = [layer for layer in layers if rank > min(layer.out_features, layer.in_features)]
    if small:
        size, more = [small[0].out_features, small[0].in_features], f" and {len(small) - 1} more" if small[1:] else ""
        problems.append(Problem("lora_rank", f"{rank} is larger than {'.'.join(small[0].key)}, {size}{more}"))
    if not layers and not problems:
        problems.append(Problem(f"{TARGETS}…", "no target layers at all"))
    if problems:
        raise ConfigError(config.name, problems)
    return layers


def _expand_component(
    config: ModelConfig, component: str, real: Mapping[str, tuple[int, int]], problems: list[Problem]
) -> list[TargetLayer]:
    wanted: set[str] = set()
    for target in config.targets.get(component, ()):
        matches = [target] if target in real else [name for name in real if name.endswith(f".{target}")]
        if not matches:
            problems.append(Problem(f"{TARGETS}{component}.{target}", f"no such layer{nearest(target, real)}"))
        wanted.update(matches)
    layers = [TargetLayer(component, name, *size) for name, size in real.items() if name in wanted]
    for layer in layers:
        problems += _layer_problems(config, component, layer.name, real[layer.name])
    problems += _stray_dimensions(config, component, real, wanted)
    return layers


def _layer_problems(config: ModelConfig, component: str, name: str, actual: tuple[int, int]) -> list[Problem]:
    key = f"{DIMENSIONS}{component}.{name}"
    stated = config.dimensions.get(component, {})
    matching = [name] if name in stated else [entry for entry in stated if name.endswith(f".{entry}")]
    if not matching:
        return [Problem(key, "the layer has no dimensions")]
    dimensions = stated[max(matching, key=len)]
    if tuple(dimensions) != tuple(actual):
        return [Problem(key, f"[out, in] is {list(dimensions)}, the real layer's is {list(actual)}")]
    return []


def _stray_dimensions(
    config: ModelConfig, component: str, real: Mapping[str, tuple[int, int]], wanted: Collection[str]
) -> list[Problem]:
    """Mistakes in dimensions that belong to no target layer."""
    problems = []
    for layer, size in config.dimensions.get(component, {}).items():
        key = f"{DIMENSIONS}{component}.{layer}"
        if layer in real:
            if layer not in wanted and tuple(size) != tuple(real[layer]):
                problems.append(Problem(key, f"[out, in] is {list(size)}, the real layer's is {list(real[layer])}"))
        elif layer not in config.targets.get(component, ()) and not any(name.endswith(f".{layer}") for name in real):
            problems.append(Problem(key, f"no such layer{nearest(layer, real)}"))
    return problems


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} appears twice")
    return data


def _components(data: Mapping[str, Any], prefix: str) -> list[str]:
    return [key.removeprefix(prefix) for key in data if key.startswith(prefix)]


def _check_keys(data: Mapping[str, Any], problems: list[Problem]) -> None:
    known = ["lora_rank", "lora_alpha", *_SCALARS]
    for key in data:
        if key not in known and not key.startswith((TARGETS, DIMENSIONS)):
            problems.append(Problem(key, f"unknown key{nearest(key, [*known, TARGETS + 'unet', DIMENSIONS + 'unet'])}"))


def _targets(data: Mapping[str, Any], component: str, problems: list[Problem]) -> tuple[str, ...]:
    key, value = f"{TARGETS}{component}", data[f"{TARGETS}{component}"]
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        problems.append(Problem(key, "expected a list of layer names"))
        return ()
    return tuple(value)


def _dimensions(data: Mapping[str, Any], component: str, problems: list[Problem]) -> dict[str, tuple[int, int]]:
    key, value = f"{DIMENSIONS}{component}", data[f"{DIMENSIONS}{component}"]
    if not isinstance(value, dict):
        problems.append(Problem(key, "expected an object of layer names to [out, in]"))
        return {}
    result = {}
    for layer, pair in value.items():
        whole = isinstance(pair, list) and len(pair) == 2 and all(type(size) is int and size > 0 for size in pair)
        if whole:
            result[layer] = (pair[0], pair[1])
        else:
            problems.append(Problem(f"{key}.{layer}", f"expected [out, in], two positive integers, got {pair!r}"))
    return result


def _text(data: Mapping[str, Any], key: str, problems: list[Problem]) -> str | None:
    value = data.get(key)
    if value is None or (isinstance(value, str) and value):
        return value
    problems.append(Problem(key, f"expected text, got {value!r}"))
    return None


def _integer(data: Mapping[str, Any], key: str, least: int, problems: list[Problem]) -> int | None:
    value = data.get(key)
    if value is None and (key not in data or key not in ("lora_rank",)):
        return None
    if type(value) is int and value >= least:
        return value
    problems.append(Problem(key, f"expected an integer ≥ {least}, got {value!r}"))
    return None


def _number(data: Mapping[str, Any], key: str, problems: list[Problem], *, above_zero: bool) -> float | None:
    value = data.get(key)
    if value is None and (key not in data or key != "lora_alpha"):
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:  # an integer that no float can hold
            number = math.inf
        if math.isfinite(number) and (number > 0 if above_zero else number >= 0):
            return number
    problems.append(Problem(key, f"expected a number {'>' if above_zero else '≥'} 0, got {value!r}"))
    return None
