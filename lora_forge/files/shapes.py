"""A layer's ΔW from the shapes of its tensors: how large it is, and whether they fit together at all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from lora_forge.errors import quoted

if TYPE_CHECKING:
    from lora_forge.files.lora_file import Part

Parts = Mapping[str, "Part"]
FACTORS = {"loha": ("hada_w1", "hada_w2"), "lokr": ("lokr_w1", "lokr_w2")}
_CORES = ("hada_t1", "hada_t2", "lokr_t1", "lokr_t2")  # of convolutions in Tucker's decomposition


def delta_shape(kind: str, parts: Parts) -> tuple[int, int] | None:
    """(out, in) of ΔW, the inputs of a convolution's window together; None where the tensors do not tell."""
    if any(core in parts for core in _CORES):
        return None
    if kind in ("lora", "dora") and "down" in parts and "up" in parts:
        down, up = parts["down"].stored.shape, parts["up"].stored.shape
        window = parts["mid"].stored.shape[2:] if "mid" in parts else ()
        return (up[0], math.prod(down[1:] + window)) if len(down) > 1 and len(up) > 1 else None
    if kind == "full" and "diff" in parts and parts["diff"].stored.shape:
        shape = parts["diff"].stored.shape
        return shape[0], math.prod(shape[1:])
    factors = [_factor(parts, name) for name in FACTORS.get(kind, ())]
    shapes = [shape for shape in factors if shape is not None]
    if len(shapes) < 2:
        return None
    if kind == "loha":
        return shapes[0]
    return math.prod(shape[0] for shape in shapes), math.prod(shape[1] for shape in shapes)


def inner_rank(kind: str, parts: Parts) -> int | None:
    """What alpha is divided by; None where nothing is (a Kronecker product of whole matrices, say)."""
    names = {"loha": ("hada_w1_b",), "lokr": ("lokr_w2_b", "lokr_w1_b")}.get(kind, ("down",))
    for name in names:
        if name in parts and parts[name].stored.shape:
            return parts[name].stored.shape[0]
    return None


def misfits(kind: str, parts: Parts) -> Iterator[str]:
    """What keeps a layer's tensors from being one layer, in words that name a key of the file."""
    any_key = quoted(next((part.key for name, part in parts.items() if name != "alpha"), ""))
    if kind in ("lora", "dora") and ({"down", "up"} & set(parts) or "mid" in parts):
        missing = [name for name in ("down", "up") if name not in parts]
        if missing:
            yield f"{any_key} has no {missing[0]} beside it"
        elif not _lora_fits(parts):
            yield _do_not_fit(parts, *(name for name in ("down", "mid", "up") if name in parts))
        return
    for name in FACTORS.get(kind, ()):
        if name not in parts:
            missing = [half for half in (f"{name}_a", f"{name}_b") if half not in parts]
            if missing:
                yield f"{any_key} has no {missing[0]} beside it"
                return
    if any(core in parts for core in _CORES) or kind not in FACTORS:
        return
    factors = [(name, _factor(parts, name)) for name in FACTORS[kind]]
    for name, shape in factors:
        if shape is None:
            yield _do_not_fit(parts, *([name] if name in parts else [f"{name}_a", f"{name}_b"]))
            return
    if kind == "loha" and factors[0][1] != factors[1][1]:
        yield _do_not_fit(parts, *(part for part in parts if part.startswith("hada_w")))


def _lora_fits(parts: Parts) -> bool:
    down, up = parts["down"].stored.shape, parts["up"].stored.shape
    if len(down) < 2 or len(up) < 2 or math.prod(up[2:]) != 1:
        return False
    if "mid" not in parts:
        return down[0] == up[1]
    mid = parts["mid"].stored.shape
    return len(mid) > 2 and mid[:2] == (up[1], down[0]) and math.prod(down[2:]) == 1


def _factor(parts: Parts, name: str) -> tuple[int, int] | None:
    """(out, in) of a matrix stored whole, or as a product of two; None if it is neither."""
    if name in parts:
        shape = parts[name].stored.shape
        return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else None
    if f"{name}_a" not in parts or f"{name}_b" not in parts:
        return None
    one, other = parts[f"{name}_a"].stored.shape, parts[f"{name}_b"].stored.shape
    return (one[0], other[1]) if len(one) == len(other) == 2 and one[1] == other[0] else None


def _do_not_fit(parts: Parts, *names: str) -> str:
    shown = [f"{quoted(parts[name].key)} {list(parts[name].stored.shape)}" for name in names]
    return f"{' and '.join(shown)} do not fit together" if len(shown) > 1 else f"{shown[0]} is no matrix"
