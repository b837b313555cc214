"""Giving layers another rank and alpha without changing their ΔW: what a format demands, and the way back.

A factor goes into B (`up`), in its own dtype where that holds each product to half a unit in the last place, else in
float32. ΔW is then right to two units in the last place; exactly the same where the factor is a power of two.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_forge.errors import LoraFileError
from lora_forge.files.layer_tensors import Layers, LayerTensors

if TYPE_CHECKING:
    import torch

# Padding to one rank may make a file this many times as large, or this large (bytes), before it is refused.
_GROWTH, _SMALL = 16, 64 * 2**20


@dataclass(frozen=True)
class Scaled:
    """A tensor times a factor. exact: no number was rounded."""

    tensor: torch.Tensor
    exact: bool


def scaled(tensor: torch.Tensor, factor: float, where: str, *, widen: bool = False) -> Scaled:
    """`tensor · factor`, right to half a unit in the last place of the result's dtype: `tensor`'s, or float32.

    widen: leave a half-precision dtype wherever it would not be exact. Raises LoraFileError, starting with `where`,
    for numbers beyond float32.
    """
    import torch

    if factor == 1 or not bool(tensor.any()):
        return Scaled(tensor, True)
    product = tensor.double() * factor
    power = abs(math.frexp(factor)[0]) == 0.5
    for dtype in (tensor.dtype, torch.float32):
        result = product.to(dtype)
        error = (result.double() - product).abs()
        bound = 0.501 * torch.finfo(dtype).eps * product.abs()
        exact = power and not bool(error.any())
        if bool((error <= bound).all()) and (exact or not widen or dtype.itemsize > 2):
            return Scaled(result, exact)
    if not bool(torch.isfinite(result).all()):
        raise LoraFileError(f"{where}: its numbers times alpha / rank (and weight, if any) are beyond float32")
    return Scaled(result, False)  # numbers so small that float32 has fewer digits for them


def uniform(layers: Layers) -> tuple[Layers, list[str]]:
    """The same ΔW with one rank and alpha per component, and what was done about it, in words.

    Ranks are padded with zeros to the largest; alpha / rank becomes the commonest, what differs goes into B. Raises
    LoraFileError where that would make the tensors many times as large.
    """
    result, notes = dict(layers), []
    for component, own in by_component(layers).items():
        ranks, alphas = {one.rank for one in own.values()}, {one.alpha for one in own.values()}
        if len(ranks) == len(alphas) == 1:
            continue
        rank = max(ranks)
        _check_growth(component, own, rank)
        alpha = float32(Counter(one.scale for one in own.values()).most_common(1)[0][0] * rank)
        if not alpha or not math.isfinite(alpha):
            raise LoraFileError(f"{component}: no one alpha stands for alphas so far apart")
        exact = True
        for layer, one in own.items():
            up = scaled(one.up, one.scale / (alpha / rank), f"{component}.{layer}")
            exact &= up.exact
            padded = replace(one, down=_padded(one.down, rank, 0), up=_padded(up.tensor, rank, 1), alpha=alpha)
            result[component, layer] = padded
        notes.append(
            f"{component}: ranks {_range(ranks)} and alphas {_range(alphas)} become one rank {rank} and one alpha "
            f"{alpha:g}, since readers take the layers of a component to be alike; "
            + ("ΔW stays the same" if exact else "ΔW stays the same to 2 units in the last place")
        )
    return result, notes


def with_alpha(layers: Layers, alphas: Mapping[str, float]) -> tuple[Layers, frozenset[str], Collection[str]]:
    """The same ΔW with another alpha for each of these components, which are uniform.

    Also the components in which ΔW is the same only to two units in the last place, or would be if they were changed
    back; and the layers, `component.layer`, whose B had to become float32. Raises LoraFileError as `scaled` does.
    """
    result, rounded, widened = dict(layers), set(), []
    for (component, layer), one in layers.items():
        alpha = alphas.get(component, one.alpha)
        if alpha == one.alpha:
            continue
        factor, where = one.alpha / alpha, f"{component}.{layer}"
        up = scaled(one.up, factor, where)
        if not up.exact:
            rounded.add(component)
        if up.tensor.dtype != one.up.dtype == one.down.dtype:
            widened.append(where)
        result[component, layer] = replace(one, up=up.tensor, alpha=alpha)
    return result, frozenset(rounded), widened


def by_component(layers: Layers) -> dict[str, dict[str, LayerTensors]]:
    """The layers as `{component: {canonical path: tensors}}`, in their order."""
    result: dict[str, dict[str, LayerTensors]] = {}
    for (component, layer), one in layers.items():
        result.setdefault(component, {})[layer] = one
    return result


def _padded(tensor: torch.Tensor, rank: int, dimension: int) -> torch.Tensor:
    import torch

    missing = rank - tensor.shape[dimension]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dimension] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dimension)


def _check_growth(component: str, own: Mapping[str, LayerTensors], rank: int) -> None:
    before = sum(one.down.nbytes + one.up.nbytes for one in own.values())
    after = sum((one.down.nbytes + one.up.nbytes) // one.rank * rank for one in own.values())
    if after > max(_GROWTH * before, _SMALL):
        raise LoraFileError(
            f"{component}: its layers have ranks from {min(one.rank for one in own.values())} to {rank}; padded to one "
            f"they would take {after / 2**20:,.0f} MiB instead of {before / 2**20:,.0f}"
        )


def float32(value: float) -> float:
    """The nearest float32."""
    import torch

    return float(torch.tensor(value, dtype=torch.float32))


def _range(values: Collection[float]) -> str:
    return f"{min(values):g}" if len(values) == 1 else f"{min(values):g} to {max(values):g}"
