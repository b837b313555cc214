"""Initializers that each break one rule."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lora_forge import InitializerSpec
from lora_forge.contracts import InitialLayer
from rule_breakers import Breaker

Pair = tuple[torch.Tensor, torch.Tensor]


def good(layer: InitialLayer) -> Pair:
    lora_a = torch.randn(layer.rank, layer.in_features, generator=layer.generator)
    return lora_a, torch.zeros(layer.out_features, layer.rank)


@dataclass
class Mutable:
    size: float = 1.0


def a_alone(layer: InitialLayer) -> Any:
    return good(layer)[0]


def lists(layer: InitialLayer) -> Any:
    return good(layer)[0].tolist(), good(layer)[1].tolist()


def transposed(layer: InitialLayer) -> Pair:
    return good(layer)[0].T, good(layer)[1]


def always_rank_three(layer: InitialLayer) -> Pair:
    return torch.ones(3, layer.in_features), torch.zeros(layer.out_features, 3)


def half(layer: InitialLayer) -> Pair:
    return good(layer)[0].half(), good(layer)[1]


def endless(layer: InitialLayer) -> Pair:
    return good(layer)[0], torch.full((layer.out_features, layer.rank), torch.nan)


_calls = itertools.count()


def counts(layer: InitialLayer) -> Pair:
    return good(layer)[0] * (1 + next(_calls)), good(layer)[1]


def global_noise(layer: InitialLayer) -> Pair:
    return torch.randn(layer.rank, layer.in_features), good(layer)[1]


class Fades:
    """Smaller from layer to layer."""

    def __init__(self) -> None:
        self.size = 1.0

    def __call__(self, layer: InitialLayer) -> Pair:
        self.size *= 0.5
        return good(layer)[0] * self.size, good(layer)[1]


class OneBuffer:
    """A tensor for each size, filled anew."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[int, ...], torch.Tensor] = {}

    def __call__(self, layer: InitialLayer) -> Pair:
        lora_a, lora_b = good(layer)
        return self.buffers.setdefault(tuple(lora_a.shape), torch.empty_like(lora_a)).copy_(lora_a), lora_b


def counts_in_its_options(layer: InitialLayer, options: Mutable) -> Pair:
    options.size += 1
    return good(layer)


def given_a_gradient(layer: InitialLayer) -> Pair:
    """As a plugin that asks for gradients should: it takes what comes."""
    lora_a, lora_b = good(layer)
    return (lora_a if layer.gradient is None else lora_a + layer.gradient.matrix().sum(0)), lora_b


def normalizes_its_gradient(layer: InitialLayer) -> Pair:
    lora_a, lora_b = good(layer)
    if layer.gradient is None:
        return lora_a, lora_b
    whole = layer.gradient.matrix()
    return lora_a + (whole / whole.norm()).sum(0), lora_b


def needs_its_gradient(layer: InitialLayer) -> Pair:
    assert layer.gradient is not None, "no gradient"
    return given_a_gradient(layer)


def scales_its_gradient_in_place(layer: InitialLayer) -> Pair:
    if layer.gradient is not None:
        layer.gradient.outputs.mul_(100)
    return given_a_gradient(layer)


def raises(layer: InitialLayer) -> Pair:
    raise ValueError("no such layer")


def spec(factory: Callable[..., Any], **settings: Any) -> InitializerSpec:
    return InitializerSpec(name="breaker", summary="breaks a rule", factory=factory, **settings)


def breaker(what: str, factory: Callable[..., Any], rule: str, *words: str, **settings: Any) -> Breaker:
    return Breaker(what, spec(factory, **settings), rule, words)


BREAKERS = [
    breaker("returns A alone", a_alone, "pair", "text_encoder.", "not two tensors (A, B)"),
    breaker("returns lists", lists, "pair", "(list, list)", "not two tensors"),
    breaker("returns A transposed", transposed, "shape", "lora_A", "shape (32, 3)", "expected (3, 32)", "rank 3"),
    breaker("knows one rank", always_rank_three, "shape", "expected (4, 32)", "rank 4"),
    breaker("returns half precision", half, "dtype", "lora_A", "torch.float16", "float32 on the CPU"),
    breaker("returns NaN", endless, "finite", "lora_B", "is NaN"),
    breaker("counts its calls", counts, "deterministic", "same layer and generator state", "layer.generator"),
    breaker("draws from the global generator", global_noise, "generator", "torch.manual_seed", "layer.generator"),
    breaker("fades from layer to layer", Fades, "order", "which layers came before it", "in reverse"),
    breaker("fills one buffer", OneBuffer, "immutable", "lora_A returned for", "return new tensors"),
    breaker("changes its options", counts_in_its_options, "immutable", "its own options", options=Mutable),
    breaker("ignores its gradient", good, "gradient", "gradient=True", "the same without one", gradient=True),
    breaker("divides by a gradient of zero", normalizes_its_gradient, "finite", "lora_A", "is NaN", gradient=True),
    breaker(
        "changes its gradient",
        scales_its_gradient_in_place,
        "immutable",
        "the gradient it is given for text_encoder.",
        gradient=True,
    ),
    breaker("cannot do without a gradient", needs_its_gradient, "runs", "no gradient", gradient=True),
    breaker("raises", raises, "runs", "ValueError: no such layer", "initializers.py, line"),
]
