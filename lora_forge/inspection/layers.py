"""What a LoRA file does, layer by layer: ‖ΔW‖ and effective rank, and what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_forge.errors import LoraFileError, quoted
from lora_forge.files.arrays import layer_alpha, read_array
from lora_forge.files.deltas import norm_and_rank
from lora_forge.files.lora_file import FileLayer, LoraFile
from lora_forge.files.shapes import misfits

if TYPE_CHECKING:
    from lora_forge.files.arrays import Array


@dataclass(frozen=True)
class LayerReport:
    """One layer of a file.

    name: as in the file. component, layer: canonical, None where the name does not tell. alpha: such that alpha /
    rank is the scale of ΔW; None where the file has none, which everyone reads as the rank. shape: (out, in) of ΔW,
    inputs of a convolution's window together. delta_norm: ‖ΔW‖, Frobenius. effective_rank: exp of the entropy of ΔW's
    normalised singular values (Roy & Vetterli 2007). Both None where they are not known: for DoRA, which depends on
    the base weights, for kinds that are not computed, and where the tensors were not read. faults: what is wrong with
    it, in words.
    """

    name: str
    component: str | None
    layer: str | None
    kind: str
    dtype: str
    rank: int | None
    alpha: float | None
    shape: tuple[int, int] | None
    delta_norm: float | None
    effective_rank: float | None
    faults: tuple[str, ...]

    @property
    def does_nothing(self) -> bool:
        """Whether ΔW is zero."""
        return self.delta_norm == 0


def report_layers(lora: LoraFile, *, measure: bool = True) -> Iterator[LayerReport]:
    """Every layer in the file's order. One layer's tensors are in memory at a time.

    measure: whether tensors are read; without them there is no alpha, no norm and no effective rank.
    """
    for layer in lora.layers:
        yield _report(lora, layer, measure=measure)


def _report(lora: LoraFile, layer: FileLayer, *, measure: bool) -> LayerReport:
    faults = list(misfits(layer.kind, layer.parts))
    if layer.kind == "alpha alone":
        faults.append("there is an alpha and nothing else")
    alpha = norm = effective = None
    if measure:
        alpha, norm, effective, found = _measure(lora, layer, fits=not faults)
        faults += found
    dtypes = {part.stored.dtype for name, part in layer.parts.items() if name != "alpha"}
    return LayerReport(
        name=layer.name,
        component=layer.component,
        layer=layer.layer,
        kind=layer.kind,
        dtype="/".join(sorted(dtypes)),
        rank=layer.rank,
        alpha=alpha,
        shape=layer.shape,
        delta_norm=norm,
        effective_rank=effective,
        faults=tuple(faults),
    )


def _measure(
    lora: LoraFile, layer: FileLayer, *, fits: bool
) -> tuple[float | None, float | None, float | None, list[str]]:
    """alpha, ‖ΔW‖, effective rank, and what is wrong with the numbers."""
    try:
        alpha = layer_alpha(lora, layer)
    except LoraFileError as error:
        return None, None, None, [str(error)]
    faults = ["alpha is 0"] if alpha == 0 else []
    if alpha is not None and not math.isfinite(alpha):
        faults.append(f"alpha is {'NaN' if math.isnan(alpha) else 'infinite'}")
    try:
        arrays = {name: read_array(lora, part) for name, part in layer.parts.items() if name != "alpha"}
    except LoraFileError as error:
        return alpha, None, None, [*faults, str(error)]
    strange = [fault for name, array in arrays.items() if (fault := _not_finite(array, layer.parts[name].key))]
    if strange or not fits or (alpha is not None and not math.isfinite(alpha)):
        return alpha, None, None, faults + strange
    scale = 1.0 if alpha is None or not layer.rank else alpha / layer.rank
    norm, effective = norm_and_rank(layer.kind, arrays, scale)
    if norm == 0 and not faults:
        faults.append("does nothing")
    if norm is not None and not math.isfinite(norm):
        return alpha, None, None, [*faults, "ΔW overflows"]
    return alpha, norm, effective, faults


def _not_finite(array: Array, key: str) -> str | None:
    import numpy as np

    if np.isfinite(array).all():
        return None
    return f"{quoted(key)} holds {'NaN' if np.isnan(array).any() else 'infinity'}"
