"""Reading a LoRA back, whoever wrote it, for layers that are known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_forge.contracts import LoraWeights, TargetLayer
from lora_forge.errors import LoraFileError, printable
from lora_forge.files.arrays import read_array
from lora_forge.files.layer_tensors import LayerTensors, read_layer
from lora_forge.files.lora_file import LoraFile, Part, open_lora
from lora_forge.files.names import own_names
from lora_forge.records import FileLayout


def read_lora(
    path: Path, layers: Sequence[TargetLayer], *, layout: FileLayout | None, rank: int, alpha: float
) -> LoraWeights:
    """The file's weights for `layers`, one prompt's, float32, with B scaled so that `alpha / rank` gives its ΔW.

    path: a file in any spelling that `open_lora` understands, or a folder of PEFT's. layout: the family's universal
    layout, if it has one. Layers the file lacks are absent.
    Raises LoraFileError when the file is not readable, holds layers that are no target and not zero, or has
    another rank.
    """
    try:
        lora = open_lora(path)
    except LoraFileError as error:
        raise LoraFileError(f"{path.name} is not a readable safetensors file: {error}") from error
    if lora.faults:
        raise LoraFileError(f"{path.name}: {lora.faults[0]}")
    targets = {layer.key: layer for layer in layers}
    names = own_names(targets, layout)
    result: LoraWeights = {}
    foreign = _not_zero(lora, _unknown(lora))
    for found in lora.layers:
        key = names.get(found.name) or (found.component or "", found.layer or "")
        if key not in targets:
            foreign += _not_zero(lora, [part for name, part in found.parts.items() if name != "alpha"])
            continue
        if not found.is_plain:
            raise LoraFileError(f"{path.name}: {printable(found.name)!r} is no plain LoRA layer")
        one = read_layer(lora, found)
        _check_fits(one, targets[key], rank, path)
        factor = one.scale / (alpha / rank)
        result.setdefault(key[0], {})[key[1]] = {"lora_A": one.down.float(), "lora_B": one.up.float() * factor}
    if foreign:
        raise LoraFileError(
            f"{path.name}: {len(foreign)} tensors belong to no target layer, {printable(foreign[0])!r} for one"
        )
    if not result:
        raise LoraFileError(f"{path.name} holds none of the target layers")
    return {
        component: {name: own[name] for c, name in targets if c == component and name in own}
        for component in dict.fromkeys(component for component, _ in targets)
        if (own := result.get(component))
    }


def _check_fits(one: LayerTensors, target: TargetLayer, rank: int, path: Path) -> None:
    where = f"{path.name}: {target.component}.{target.name}"
    if one.rank != rank:
        raise LoraFileError(f"{where} has rank {one.rank}, the run has rank {rank}; --rank sets it")
    size = [one.up.shape[0], *one.down.shape[1:]]
    if size != [target.out_features, target.in_features]:
        raise LoraFileError(f"{where} is {size}, the model's layer is another size")


def _unknown(lora: LoraFile) -> list[Part]:
    keys = set(lora.unknown)
    stored = ((file, key, one) for file, header in lora.headers.items() for key, one in header.tensors.items())
    return [Part(file, key, one) for file, key, one in stored if key in keys]


def _not_zero(lora: LoraFile, parts: Iterable[Part]) -> list[str]:
    """The keys of those that hold anything."""
    return [part.key for part in parts if read_array(lora, part).any()]
