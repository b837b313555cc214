"""LoRA initialization: what an initializer makes of every target layer, or what an earlier file holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lora_forge.contracts import Initializer, InitialLayer, LayerGradient, LoraWeights, TargetLayer
from lora_forge.errors import blaming
from lora_forge.files.read import read_lora
from lora_forge.plan import Plan, Request
from lora_forge.seeds import layer_generator
from lora_forge.training.first_gradient import Gradients


def earlier_weights(plan: Plan, layers: Sequence[TargetLayer]) -> LoraWeights:
    """What `init_from` holds of these layers, one prompt's; nothing without it. Raises LoraFileError."""
    if not plan.config.init_from:
        return {}
    layout = plan.backend_spec.layout
    return read_lora(plan.config.init_from, layers, layout=layout, rank=plan.rank, alpha=plan.alpha)


def initial_weights(
    plan: Plan,
    layers: Sequence[TargetLayer],
    requests: Sequence[Request],
    earlier: LoraWeights,
    gradients: Gradients,
) -> LoraWeights:
    """Weights of all prompts, stacked: lora_A `(prompts, rank, in)`, lora_B `(prompts, out, rank)`.

    Layers that `earlier` holds start from there, the others from the initializer. Raises RunFailed when that raises.
    """
    initializer = plan.initializer.build()
    result: LoraWeights = {}
    for layer in layers:
        known = earlier.get(layer.component, {}).get(layer.name)
        own = gradients.get(layer.key, [None] * len(requests))
        rows = [
            known or _initialize(initializer, layer, plan, request.seed, gradient)
            for request, gradient in zip(requests, own, strict=True)
        ]
        result.setdefault(layer.component, {})[layer.name] = {
            name: torch.stack([row[name] for row in rows]) for name in ("lora_A", "lora_B")
        }
    return result


def _initialize(
    initializer: Initializer, layer: TargetLayer, plan: Plan, seed: int, gradient: LayerGradient | None
) -> dict[str, torch.Tensor]:
    initial = InitialLayer(
        component=layer.component,
        name=layer.name,
        out_features=layer.out_features,
        in_features=layer.in_features,
        rank=plan.rank,
        generator=layer_generator(seed, layer.component, layer.name),
        gradient=gradient,
    )
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
