"""How close two LoRA files are, from their tensors alone, in float64.

⟨ΔW, ΔW'⟩ = s s' · sum((Bᵀ B') ∘ (A A'ᵀ)) with s = alpha / rank: only rank × rank matrices are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

_ENCODERS = {"lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}  # kohya's prefixes, as the files have them
Layer = tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]  # alpha / rank · B, and A


def compare_files(one: Path, other: Path) -> dict[str, Any]:
    """Per encoder: cosine and relative error ‖ΔW − ΔW'‖ / ‖ΔW'‖ of all layers together, and the layers' cosines.

    other: what `one` is held against. Layers that change nothing in both files are left out.
    """
    mine, theirs = _read(one), _read(other)
    if mine.keys() != theirs.keys():
        raise ValueError(f"{one.name} and {other.name} have different layers")
    return {
        encoder: _compare([(mine[name], theirs[name]) for name in mine if name.startswith(prefix)])
        for prefix, encoder in _ENCODERS.items()
    }


def compare_losses(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest relative difference of two runs' losses, step by step."""
    return max((abs(mine - theirs) / abs(theirs) for mine, theirs in zip(one, other, strict=True)), default=0.0)


def _compare(pairs: Sequence[tuple[Layer, Layer]]) -> dict[str, Any]:
    import numpy as np

    products = np.array([[_inner(a, b), _inner(a, a), _inner(b, b)] for a, b in pairs]).reshape(-1, 3)
    products = products[(products[:, 1] > 0) | (products[:, 2] > 0)]
    between, own, others = products.sum(axis=0)
    lengths = np.sqrt(products[:, 1] * products[:, 2])
    cosines = np.divide(products[:, 0], lengths, out=np.zeros_like(lengths), where=lengths > 0)
    return {
        "layers": len(products),
        "cosine": float(between / np.sqrt(own * others)) if own and others else None,
        "relative_error": float(np.sqrt(max(own + others - 2 * between, 0) / others)) if others else None,
        "layer_cosines": _spread(cosines) if len(cosines) else None,
    }


def _spread(values: np.ndarray[Any, Any]) -> Mapping[str, float]:
    import numpy as np

    return {"min": float(values.min()), "5%": float(np.quantile(values, 0.05)), "median": float(np.median(values))}


def _inner(one: Layer, other: Layer) -> float:
    (b, a), (other_b, other_a) = one, other
    return float(((b.T @ other_b) * (a @ other_a.T)).sum())


def _read(path: Path) -> dict[str, Layer]:
    from safetensors.numpy import load_file

    tensors = load_file(path)
    layers = {}
    for name in (key.removesuffix(".lora_down.weight") for key in tensors if key.endswith(".lora_down.weight")):
        down, up = (tensors[f"{name}.{part}.weight"].astype("f8") for part in ("lora_down", "lora_up"))
        alpha = float(tensors[f"{name}.alpha"])
        layers[name] = (alpha / down.shape[0] * up, down)
    return layers
