"""ΔW of a layer, whatever its kind, as few numbers as its singular values need."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_forge.files.shapes import FACTORS

if TYPE_CHECKING:
    from lora_forge.files.arrays import Array

Arrays = Mapping[str, "Array"]
_LARGEST = 2**26  # numbers of a ΔW that is made whole
_MOST_SINGULAR_VALUES = 2048  # more would take minutes


def norm_and_rank(kind: str, arrays: Arrays, scale: float) -> tuple[float | None, float | None]:
    """‖ΔW‖ (Frobenius) and its effective rank: exp of the entropy of its normalised singular values (Roy & Vetterli
    2007). None for what is not known: kinds that depend on the base weights, or that are not computed.

    arrays: a layer's tensors, float32, that fit together. scale: what their product is multiplied by.
    """
    import numpy as np

    with np.errstate(all="ignore"):  # what overflows is infinite, and told of as such
        pieces = _pieces(kind, arrays)
        if pieces is None:
            return None, None
        norm, effective = abs(scale), 1.0
        for piece in pieces:
            norm *= float(np.linalg.norm(piece))
            effective *= _effective_rank(piece) if min(piece.shape) <= _MOST_SINGULAR_VALUES else np.nan
    if norm == 0:
        return norm, 0.0
    return norm, effective if np.isfinite(effective) else None


def _pieces(kind: str, arrays: Arrays) -> list[Any] | None:
    """Matrices, float64, whose Kronecker product has the singular values of ΔW."""
    if kind == "lora":
        return [_core(arrays["up"], arrays["down"], arrays.get("mid"))]
    if kind == "full" and "diff" in arrays:
        diff = arrays["diff"].astype("f8")
        return [diff.reshape(diff.shape[0], -1) if diff.ndim and diff.size else diff.reshape(1, -1)]
    if kind not in FACTORS or any(name[:6] in ("hada_t", "lokr_t") for name in arrays):
        return None
    factors = [_factor(arrays, name) for name in FACTORS[kind]]
    if kind == "loha":
        product = _hadamard(*factors)
        return None if product is None else [product]
    pieces = []
    for up, down in factors:
        pieces.append(up.astype("f8") if down is None else _core(up, down))
    return pieces


def _factor(arrays: Arrays, name: str) -> tuple[Any, Any]:
    """A matrix as a product of two, or as itself and None."""
    if name in arrays:
        whole = arrays[name]
        return whole.reshape(whole.shape[0], -1) if whole.size else whole.reshape(1, -1), None
    return arrays[f"{name}_a"], arrays[f"{name}_b"]


def _core(up: Array, down: Array, mid: Array | None = None) -> Any:
    """A small matrix with the singular values of up @ down: the R of one QR times the R of the other, transposed.

    mid: of a convolution in three parts, the middle one, (rank, rank, height, width).
    """
    import numpy as np

    if not up.any() or not down.any():
        return np.zeros((1, 1))
    left = _triangle(up.reshape(up.shape[:2]))
    if mid is not None:
        right = _triangle(down.reshape(down.shape[:2]).T)
        core = np.einsum("or,rshw,is->oihw", left, mid.astype("f8"), right, optimize=True)
        return core.reshape(core.shape[0], -1)
    return left @ _triangle(down.reshape(down.shape[0], -1).T).T


def _triangle(matrix: Array) -> Any:
    """R of a QR, float64: by Cholesky of MᵀM where M is tall, ten times as fast and off by 1e-8 · ‖M‖ at most."""
    import numpy as np

    tall = matrix.astype("f8")
    if tall.shape[0] >= 4 * tall.shape[1]:
        with contextlib.suppress(np.linalg.LinAlgError):  # columns that depend on each other
            return np.linalg.cholesky(tall.T @ tall).T
    return np.linalg.qr(tall, mode="r")


def _hadamard(first: tuple[Any, Any], second: tuple[Any, Any]) -> Any:
    """The elementwise product of two low-rank matrices, which is a low-rank matrix too: its core, or else itself."""
    import numpy as np

    if any(half is None for half in (*first, *second)):
        return None
    (one_up, one_down), (two_up, two_down) = first, second
    outputs, inputs = one_up.shape[0], one_down.shape[1]
    rank = one_up.shape[1] * two_up.shape[1]
    if not outputs * inputs * rank:
        return np.zeros((1, 1))
    if rank < min(outputs, inputs) and rank * max(outputs, inputs) <= _LARGEST:
        up = (one_up[:, :, None].astype("f8") * two_up[:, None, :]).reshape(outputs, rank)
        down = (one_down[:, None, :].astype("f8") * two_down[None, :, :]).reshape(rank, inputs)
        return _core(up, down)
    if outputs * inputs > _LARGEST:
        return None
    return (one_up.astype("f8") @ one_down.astype("f8")) * (two_up.astype("f8") @ two_down.astype("f8"))


def _effective_rank(matrix: Any) -> float:
    import numpy as np

    if not matrix.size:
        return 0.0
    try:
        singular = np.linalg.svd(matrix, compute_uv=False)
    except np.linalg.LinAlgError:  # of numbers that overflowed
        return float("nan")
    total = singular.sum()
    if not total:
        return 0.0
    shares = singular[singular > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))
