"""Examining an initializer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from lora_forge.contracts import InitialLayer, LayerGradient, LayerKey, TargetLayer
from lora_forge.options import options_as_dict
from lora_forge.records import InitializerSpec
from lora_forge.seeds import generator_for, layer_generator
from lora_forge.testing.compare import FIRST_SEED, SECOND_SEED, not_finite, same_bits, shape_of
from lora_forge.testing.examination import Book, Broken, global_seed
from lora_forge.testing.stage import RANK, some_layers

_SEED = 42
_NAMES = ("lora_A", "lora_B")
_Made = dict[LayerKey, tuple[torch.Tensor, torch.Tensor]]
_Gradient = Callable[[TargetLayer], LayerGradient | None]


def examine_initializer(
    book: Book, spec: InitializerSpec, options: Any, make: Callable[[], Callable[..., Any]]
) -> None:
    """See `lora_forge.testing.RULES`."""
    layers = some_layers()
    told = options_as_dict(options)
    gradients: list[_Gradient] = [_no_gradient]
    if spec.gradient:
        gradients += [partial(_some_gradient, rows=2 * RANK), partial(_some_gradient, rows=1), _zero_gradient]
    for gradient in gradients:
        _examine(book, layers, gradient, make)
    with book.rule("gradient"):
        if spec.gradient:
            _check_gradient_used(make, layers, gradients[1])
    with book.rule("immutable"):
        for gradient in gradients:
            _check_immutable(make(), layers, gradient)
        if options_as_dict(options) != told:
            raise Broken("it changes its own options; compute what differs from them instead")


def _examine(
    book: Book, layers: Sequence[TargetLayer], gradient: _Gradient, make: Callable[[], Callable[..., Any]]
) -> None:
    with book.rule("pair", vital=True):
        first = _initialize(make(), layers, FIRST_SEED, gradient)
    with book.rule("shape", vital=True):
        _check_shapes(first, layers)
        _check_shapes(_initialize(make(), layers, FIRST_SEED, gradient, rank=RANK + 1), layers, rank=RANK + 1)
    with book.rule("dtype", vital=True):
        _check_dtype(first)
    with book.rule("finite", vital=True):
        _check_finite(first)
    with book.rule("deterministic", vital=True):
        _compare(
            first,
            _initialize(make(), layers, FIRST_SEED, gradient),
            "differs between two calls with the same layer and generator state; draw from layer.generator and from "
            "nothing else: no clock, no counter",
        )
    with book.rule("generator", vital=True):
        _compare(
            first,
            _initialize(make(), layers, SECOND_SEED, gradient),
            "changes with the global seed (torch.manual_seed); pass generator=layer.generator to whatever draws",
        )
    with book.rule("order"):
        _compare(
            first,
            _initialize(make(), layers[::-1], FIRST_SEED, gradient),
            "depends on which layers came before it: the same layer has other values when they come in reverse; keep "
            "nothing from one layer to the next",
        )


def _no_gradient(layer: TargetLayer) -> None:
    return None


def _some_gradient(layer: TargetLayer, rows: int) -> LayerGradient:
    """A gradient of rank `rows`, the same at every call, of a size that is met in a run."""
    generator = generator_for(f"gradient of {layer.component}.{layer.name}")
    outputs = 1e-3 * torch.randn(rows, layer.out_features, generator=generator)
    return LayerGradient(outputs, torch.randn(rows, layer.in_features, generator=generator))


def _zero_gradient(layer: TargetLayer) -> LayerGradient:
    some = _some_gradient(layer, 1)
    return LayerGradient(torch.zeros_like(some.outputs), some.inputs)


def _initialize(
    make: Callable[..., Any], layers: Sequence[TargetLayer], seed: int, gradient: _Gradient, *, rank: int = RANK
) -> _Made:
    """Copies of what it returns for each layer, with the layer's own generator as in a run."""
    made: _Made = {}
    with global_seed(seed):
        for layer in layers:
            lora_a, lora_b = _call(make, layer, gradient(layer), rank)
            made[layer.key] = lora_a.detach().clone(), lora_b.detach().clone()
    return made


def _call(
    initializer: Callable[..., Any], layer: TargetLayer, gradient: LayerGradient | None, rank: int = RANK
) -> tuple[torch.Tensor, torch.Tensor]:
    initial = InitialLayer(
        component=layer.component,
        name=layer.name,
        out_features=layer.out_features,
        in_features=layer.in_features,
        rank=rank,
        generator=layer_generator(_SEED, layer.component, layer.name),
        gradient=gradient,
    )
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


def _check_gradient_used(
    make: Callable[[], Callable[..., Any]], layers: Sequence[TargetLayer], gradient: _Gradient
) -> None:
    without = _initialize(make(), layers, FIRST_SEED, _no_gradient)
    given = _initialize(make(), layers, FIRST_SEED, gradient)
    if all(same_bits(*both) for key in given for both in zip(given[key], without[key], strict=True)):
        raise Broken(
            "its record declares gradient=True, but A and B are the same without one; use layer.gradient, or leave the "
            "declaration out, which costs a pass through the model"
        )


def _check_immutable(initializer: Callable[..., Any], layers: Sequence[TargetLayer], gradient: _Gradient) -> None:
    """Of layers of one size, where one buffer would fit all."""
    sizes: dict[tuple[int, int], list[TargetLayer]] = {}
    for layer in layers:
        sizes.setdefault((layer.out_features, layer.in_features), []).append(layer)
    first, *others = max(sizes.values(), key=len)
    given = gradient(first)
    returned = _call(initializer, first, given)
    key, expected = ".".join(first.key), gradient(first)
    if given and expected:
        factors = ((given.outputs, expected.outputs), (given.inputs, expected.inputs))
        if not all(same_bits(*both) for both in factors):
            raise Broken(f"it changes the gradient it is given for {key}; compute new tensors (no mul_, no x[...] = …)")
    copies = [tensor.detach().clone() for tensor in returned]
    for layer in others:
        _call(initializer, layer, gradient(layer))
    for name, tensor, copy in zip(_NAMES, returned, copies, strict=True):
        if not same_bits(tensor, copy):
            raise Broken(f"{name} returned for {key} changes when the next layer is asked for; return new tensors")


def _compare(one: _Made, other: _Made, what: str) -> None:
    for key, pair in one.items():
        for name, mine, theirs in zip(_NAMES, pair, other[key], strict=True):
            if not same_bits(mine, theirs):
                raise Broken(f"{name} of {'.'.join(key)} {what}")
