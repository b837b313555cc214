"""Deriving a model config from a model's architecture, without reading its weights."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from lora_forge.config.model import DIMENSIONS, TARGETS, expand_targets, parse_model_config
from lora_forge.config.run import DEFAULT_ITERATIONS, DEFAULT_L2
from lora_forge.contracts import BackendRequest
from lora_forge.errors import ConfigError, ModelError, blaming, nearest
from lora_forge.options import parse_options
from lora_forge.plugins import Registry, build
from lora_forge.recognition import recognized_backend


def derive_model_config(
    base_model: str, targets: Sequence[str], registry: Registry, *, backend: str | None, rank: int, alpha: float
) -> dict[str, Any]:
    """A model config as JSON-ready data: every layer that one of `targets` names, with its dimensions.

    targets: a group the backend knows (`attention`, `attention+mlp`, `all`), or a pattern with `*` and `?`
    over canonical paths, with or without the component before it. backend: None for the one that recognizes
    the base model. Raises ModelError when one matches nothing,
    ConfigError when rank or alpha do not fit.
    """
    backend = backend or recognized_backend(base_model, registry)
    supplied = registry.resolve("backend", backend)
    options, mistakes = parse_options(supplied.spec.options, {}, key=backend)
    if mistakes:
        raise ConfigError("", mistakes)
    with blaming(f"backend {backend!r}"):
        model = build(supplied, options)(BackendRequest(base_model, "cpu", "float32"))
        architecture = model.architecture()
    chosen: dict[str, list[str]] = {component: [] for component in architecture}
    for target in targets:
        group = model.target_groups.get(target)
        matched = False
        for component, layers in architecture.items():
            for layer in layers:
                path = f"{component}.{layer}"
                fits = group(layer) if group else fnmatchcase(layer, target) or fnmatchcase(path, target)
                if fits:
                    matched = True
                    chosen[component].append(layer)
        if not matched:
            raise ModelError(f"targets: {target!r} matches no layer{nearest(target, model.target_groups)}")
    data: dict[str, Any] = {
        "backend": backend,
        "base_model": base_model,
        "lora_rank": rank,
        "lora_alpha": alpha,
        "iterations": DEFAULT_ITERATIONS,
        "learning_rate": 1e-4,
        "regularization_strength": DEFAULT_L2,
    }
    for component, layers in architecture.items():
        data[f"{TARGETS}{component}"] = [layer for layer in layers if layer in set(chosen[component])]
        data[f"{DIMENSIONS}{component}"] = {layer: list(layers[layer]) for layer in data[f"{TARGETS}{component}"]}
    expand_targets(parse_model_config(data, name=base_model, source="the new model config"), architecture, rank=rank)
    return data
