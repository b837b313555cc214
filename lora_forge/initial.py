"""LoRA initialization: what an initializer makes of every target layer, or what an earlier file holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lora_forge.contracts import Initializer, InitialLayer, LoraWeights, TargetLayer
from lora_forge.errors import blaming
from lora_forge.files.read import read_lora
from lora_forge.model import LoadedModel
from lora_forge.plan import Plan, Request
from lora_forge.seeds import layer_generator


def initial_weights(plan: Plan, model: LoadedModel, requests: Sequence[Request]) -> LoraWeights:
    """Weights of all prompts, stacked: lora_A `(prompts, rank, in)`, lora_B `(prompts, out, rank)`.

    Layers that `init_from` holds start from there, the others from the initializer. Raises RunFailed
    when the initializer raises, LoraFileError when the file does not fit.
    """
    initializer = plan.initializer.build()
    earlier: LoraWeights = {}
    if plan.config.init_from:
        layout = plan.backend_spec.layout
        earlier = read_lora(plan.config.init_from, model.layers, layout=layout, rank=plan.rank, alpha=plan.alpha)
    result: LoraWeights = {}
    for layer in model.layers:
        known = earlier.get(layer.component, {}).get(layer.name)
        rows = [known] * len(requests) if known else [_initialize(initializer, layer, plan, r.seed) for r in requests]
        result.setdefault(layer.component, {})[layer.name] = {
            name: torch.stack([row[name] for row in rows]) for name in ("lora_A", "lora_B")
        }
    return result


def _initialize(initializer: Initializer, layer: TargetLayer, plan: Plan, seed: int) -> dict[str, torch.Tensor]:
    generator = layer_generator(seed, layer.component, layer.name)
    initial = InitialLayer(layer.component, layer.name, layer.out_features, layer.in_features, plan.rank, generator)
    with blaming(f"initializer {plan.initializer.name!r}"):
        lora_a, lora_b = initializer(initial)
        pair = {"lora_A": lora_a.float(), "lora_B": lora_b.float()}
        _check_pair(pair, layer, plan.rank)
    return pair


def _check_pair(pair: dict[str, torch.Tensor], layer: TargetLayer, rank: int) -> None:
    shapes = {"lora_A": (rank, layer.in_features), "lora_B": (layer.out_features, rank)}
    for name, expected in shapes.items():
        where = f"{name} of {layer.component}.{layer.name}"
        if tuple(pair[name].shape) != expected:
            raise ValueError(f"{where} has shape {tuple(pair[name].shape)}, expected {expected}")
        if not bool(pair[name].isfinite().all()):
            raise ValueError(f"{where} is not finite")
