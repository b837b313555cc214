"""Comparing what people get together with what each gets alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Together three prompts are one matrix product of three times the rows: the same numbers but for float32's rounding.
VALUE_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3

TOGETHER = (0, 1, 2)
OTHER_MATES = (0, 3, 4)
FIRST_SEED, SECOND_SEED = 1, 2  # of the global generators


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal shapes and values; NaN equals nothing."""
    return one.shape == other.shape and torch.equal(one, other)


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    """‖one − other‖ / the larger norm; 0 if both are zero."""
    one, other = one.detach().double(), other.detach().double()
    size = max(float(one.norm()), float(other.norm()))
    return float((one - other).norm()) / size if size else 0.0


def shape_of(value: object) -> str:
    """A value's shape, or its type where it has none, for a message."""
    return f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"


def listed(names: Sequence[str], most: int = 3) -> str:
    """`a, b and 5 more`."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def not_finite(tensor: torch.Tensor) -> str:
    """`NaN` or `infinite` if any number is, else ``""``."""
    if bool(tensor.isnan().any()):
        return "NaN"
    return "" if bool(tensor.isfinite().all()) else "infinite"
