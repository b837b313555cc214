"""Reading a LoRA back: the layouts our savers write, for layers that are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_forge.contracts import LoraWeights, TargetLayer
from lora_forge.errors import LoraFileError, LoraForgeError
from lora_forge.files.names import diffusers_name, universal_name

if TYPE_CHECKING:
    import torch


def read_lora(path: Path, layers: Sequence[TargetLayer], *, family: str, rank: int, alpha: float) -> LoraWeights:
    """The file's weights for `layers`, one prompt's, float32, with B scaled so that `alpha / rank` gives its ΔW.

    Layers the file lacks are absent. Raises LoraFileError when the file is not readable, holds layers that
    are no target and not zero, or has another rank.
    """
    tensors = _read_tensors(path)
    result: LoraWeights = {}
    for layer in layers:
        pair = _find(tensors, layer, family)
        if pair is None:
            continue
        down, up, file_alpha = pair
        where = f"{path.name}: {layer.component}.{layer.name}"
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
            raise LoraFileError(f"{where}: A {tuple(down.shape)} and B {tuple(up.shape)} do not fit together")
        if down.shape[0] != rank:
            raise LoraFileError(f"{where} has rank {down.shape[0]}, the run has rank {rank}; --rank sets it")
        if (up.shape[0], down.shape[1]) != (layer.out_features, layer.in_features):
            raise LoraFileError(f"{where} is {[up.shape[0], down.shape[1]]}, the model's layer is another size")
        factor = (file_alpha / rank) / (alpha / rank)
        result.setdefault(layer.component, {})[layer.name] = {"lora_A": down.float(), "lora_B": up.float() * factor}
    foreign = [name for name, tensor in tensors.items() if not name.endswith(".alpha") and bool(tensor.any())]
    if foreign:
        raise LoraFileError(f"{path.name}: {len(foreign)} tensors belong to no target layer, {foreign[0]!r} for one")
    if not result:
        raise LoraFileError(f"{path.name} holds none of the target layers")
    return result


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise LoraFileError(f"{path.name} is not a readable safetensors file: {error}") from error


def _find(
    tensors: dict[str, torch.Tensor], layer: TargetLayer, family: str
) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """A layer's A, B and alpha, taken out of `tensors`; None if it is not there."""
    spelled = [(diffusers_name(layer.component, layer.name), ".lora_A.weight", ".lora_B.weight")]
    try:
        spelled.append((universal_name(family, layer.component, layer.name), ".lora_down.weight", ".lora_up.weight"))
    except LoraForgeError:
        pass  # the family has no universal layout
    for name, a, b in spelled:
        if name + a in tensors and name + b in tensors:
            down, up = tensors.pop(name + a), tensors.pop(name + b)
            stored = tensors.pop(f"{name}.alpha", None)
            return down, up, float(stored) if stored is not None else float(down.shape[0])
    return None
