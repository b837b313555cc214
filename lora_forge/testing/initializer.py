"""Examining an initializer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lora_forge.contracts import InitialLayer, LayerKey, TargetLayer
from lora_forge.options import options_as_dict
from lora_forge.records import InitializerSpec
from lora_forge.seeds import layer_generator
from lora_forge.testing.compare import FIRST_SEED, SECOND_SEED, not_finite, same_bits, shape_of
from lora_forge.testing.examination import Book, Broken, global_seed
from lora_forge.testing.stage import RANK, some_layers

_SEED = 42
_NAMES = ("lora_A", "lora_B")
_Made = dict[LayerKey, tuple[torch.Tensor, torch.Tensor]]


def examine_initializer(
    book: Book, spec: InitializerSpec, options: Any, make: Callable[[], Callable[..., Any]]
) -> None:
    """See `lora_forge.testing.RULES`."""
    layers = some_layers()
    told = options_as_dict(options)
    with book.rule("pair", vital=True):
        first = _initialize(make(), layers, FIRST_SEED)
    with book.rule("shape", vital=True):
        _check_shapes(first, layers)
        _check_shapes(_initialize(make(), layers, FIRST_SEED, rank=RANK + 1), layers, rank=RANK + 1)
    with book.rule("dtype", vital=True):
        _check_dtype(first)
    with book.rule("finite", vital=True):
        _check_finite(first)
    with book.rule("deterministic", vital=True):
        _compare(
            first,
            _initialize(make(), layers, FIRST_SEED),
            "differs between two calls with the same layer and generator state; draw from layer.generator and from "
            "nothing else: no clock, no counter",
        )
    with book.rule("generator", vital=True):
        _compare(
            first,
            _initialize(make(), layers, SECOND_SEED),
            "changes with the global seed (torch.manual_seed); pass generator=layer.generator to whatever draws",
        )
    with book.rule("order"):
        _compare(
            first,
            _initialize(make(), layers[::-1], FIRST_SEED),
            "depends on which layers came before it: the same layer has other values when they come in reverse; keep "
            "nothing from one layer to the next",
        )
    with book.rule("immutable"):
        _check_immutable(make(), layers)
        if options_as_dict(options) != told:
            raise Broken("it changes its own options; compute what differs from them instead")


def _initialize(make: Callable[..., Any], layers: Sequence[TargetLayer], seed: int, *, rank: int = RANK) -> _Made:
    """Copies of what it returns for each layer, with the layer's own generator as in a run."""
    made: _Made = {}
    with global_seed(seed):
        for layer in layers:
            lora_a, lora_b = _call(make, layer, rank)
            made[layer.key] = lora_a.detach().clone(), lora_b.detach().clone()
    return made


def _call(initializer: Callable[..., Any], layer: TargetLayer, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = layer_generator(_SEED, layer.component, layer.name)
    initial = InitialLayer(layer.component, layer.name, layer.out_features, layer.in_features, rank, generator)
    returned = initializer(initial)
    pair = tuple(returned) if isinstance(returned, tuple | list) else (returned,)
    if len(pair) != 2 or not all(isinstance(one, torch.Tensor) for one in pair):
        got = ", ".join(shape_of(one) if isinstance(one, torch.Tensor) else type(one).__name__ for one in pair)
        raise Broken(f"for {'.'.join(layer.key)} it returns ({got}), not two tensors (A, B)")
    return pair[0], pair[1]


def _check_shapes(made: _Made, layers: Sequence[TargetLayer], *, rank: int = RANK) -> None:
    for layer in layers:
        expected = ((rank, layer.in_features), (layer.out_features, rank))
        for name, tensor, shape in zip(_NAMES, made[layer.key], expected, strict=True):
            if tuple(tensor.shape) != shape:
                sizes = f"rank {rank}, in_features {layer.in_features}, out_features {layer.out_features}"
                raise Broken(f"{name} of {'.'.join(layer.key)} has {shape_of(tensor)}, expected {shape} ({sizes})")


def _check_dtype(made: _Made) -> None:
    for key, pair in made.items():
        for name, tensor in zip(_NAMES, pair, strict=True):
            if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
                raise Broken(
                    f"{name} of {'.'.join(key)} is {tensor.dtype} on {tensor.device}; return float32 on the CPU"
                )


def _check_finite(made: _Made) -> None:
    for key, pair in made.items():
        for name, tensor in zip(_NAMES, pair, strict=True):
            if how := not_finite(tensor):
                raise Broken(f"{name} of {'.'.join(key)} is {how}")


def _check_immutable(initializer: Callable[..., Any], layers: Sequence[TargetLayer]) -> None:
    """Of layers of one size, where one buffer would fit all."""
    sizes: dict[tuple[int, int], list[TargetLayer]] = {}
    for layer in layers:
        sizes.setdefault((layer.out_features, layer.in_features), []).append(layer)
    same = max(sizes.values(), key=len)
    returned = [(layer, _call(initializer, layer, RANK)) for layer in same[:1]]
    copies = [tensor.detach().clone() for tensor in returned[0][1]]
    for layer in same[1:]:
        _call(initializer, layer, RANK)
    for name, tensor, copy in zip(_NAMES, returned[0][1], copies, strict=True):
        if not same_bits(tensor, copy):
            key = ".".join(returned[0][0].key)
            raise Broken(f"{name} returned for {key} changes when the next layer is asked for; return new tensors")


def _compare(one: _Made, other: _Made, what: str) -> None:
    for key, pair in one.items():
        for name, mine, theirs in zip(_NAMES, pair, other[key], strict=True):
            if not same_bits(mine, theirs):
                raise Broken(f"{name} of {'.'.join(key)} {what}")
