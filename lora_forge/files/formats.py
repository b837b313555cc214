"""The formats that a LoRA is written in: what each demands of the layers, and the tensors it makes of them."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_forge.errors import LoraFileError, LoraForgeError
from lora_forge.files.adapter_config import CONFIG, WEIGHTS
from lora_forge.files.canonical import write_safetensors
from lora_forge.files.layer_tensors import Layers, LayerTensors, torch_dtype
from lora_forge.files.names import diffusers_name, missing_siblings, universal_name
from lora_forge.files.scaling import by_component, float32, uniform, with_alpha
from lora_forge.records import FileLayout

if TYPE_CHECKING:
    import torch

FORMATS = ("safetensors", "diffusers", "peft")
FOLDERS = ("peft",)


@dataclass(frozen=True)
class Laid:
    """Layers as a format has them: one rank and alpha per component, and for `diffusers` alpha = rank.

    padded: layers of zeros added, `component.layer`. widened: layers whose B became float32. notes: what changed, in
    words.
    """

    layers: Layers
    padded: tuple[str, ...]
    widened: Collection[str]
    notes: tuple[str, ...]


def lay_out(layers: Layers, format: str, *, pad: bool = True) -> Laid:
    """The same ΔW in layers that `format` can hold. Raises LoraFileError where numbers would not fit a float32.

    pad: add layers of zeros where readers of the format demand an encoder's whole attention.
    """
    layers, notes = uniform(layers)
    padded: tuple[str, ...] = ()
    if pad and format != "peft":
        layers, padded = with_siblings(layers)
    if format == "safetensors":
        layers = {key: replace(one, alpha=_nearest_float32(one.alpha)) for key, one in layers.items()}
    firsts = {component: next(iter(own.values())) for component, own in by_component(layers).items()}
    folded = {
        component: float(first.rank)
        for component, first in firsts.items()
        if format == "diffusers" or (format == "safetensors" and first.alpha != float32(first.alpha))
    }
    layers, rounded, widened = with_alpha(layers, folded)
    notes += [
        f"{component}: alpha / rank, {firsts[component].scale:g}, goes into B, which rounds: ΔW stays the same to 2 "
        "units in the last place, and so it does if this is converted back"
        for component in sorted(rounded)
    ]
    return Laid(layers, padded, widened, tuple(notes))


def universal_tensors(layers: Layers, layout: FileLayout) -> dict[str, torch.Tensor]:
    """The family's universal layout: kohya's keys, and alpha for every layer.

    Raises LoraForgeError for a layer that the layout has no name for.
    """
    import torch

    tensors: dict[str, torch.Tensor] = {}
    for (component, layer), one in layers.items():
        name = universal_name(layout, component, layer)
        alpha = torch.tensor(one.alpha, dtype=torch_dtype(one.alpha_dtype))
        tensors[f"{name}.lora_down.weight"] = one.down
        tensors[f"{name}.lora_up.weight"] = one.up
        tensors[f"{name}.alpha"] = alpha if float(alpha) == one.alpha else torch.tensor(one.alpha, dtype=torch.float32)
    return tensors


def diffusers_tensors(layers: Layers) -> dict[str, torch.Tensor]:
    """diffusers' spelling, which has no alpha: that of every layer must be its rank."""
    tensors: dict[str, torch.Tensor] = {}
    for key, one in layers.items():
        tensors[f"{diffusers_name(*key)}.lora_A.weight"] = one.down
        tensors[f"{diffusers_name(*key)}.lora_B.weight"] = one.up
    return tensors


def peft_adapter(component: str, layers: Mapping[str, LayerTensors]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """One component's layers, of one rank and alpha, as PEFT's weights and config.

    PEFT finds a layer by the exact path it has in the model, so these are the paths of the transformers installed.
    """
    tensors: dict[str, torch.Tensor] = {}
    paths = {layer: _installed_path(component, layer) for layer in layers}
    for layer, one in layers.items():
        tensors[f"base_model.model.{paths[layer]}.lora_A.weight"] = one.down
        tensors[f"base_model.model.{paths[layer]}.lora_B.weight"] = one.up
    first = next(iter(layers.values()))
    config = {
        "peft_type": "LORA",
        "r": first.rank,
        "lora_alpha": int(first.alpha) if first.alpha.is_integer() else first.alpha,
        "target_modules": sorted(paths.values()),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    return tensors, config


def write_format(
    path: Path, format: str, layers: Layers, layout: FileLayout | None, metadata: Mapping[str, str]
) -> None:
    """Write layers that were laid out for this format: a file, or for `peft` what goes into the empty folder `path`.

    layout: needed for `safetensors`. Raises LoraFileError for a layer without a name, OSError as the disk does.
    """
    if format == "peft":
        for component, own in by_component(layers).items():
            tensors, config = peft_adapter(component, own)
            folder = path / component
            folder.mkdir()
            write_safetensors(folder / WEIGHTS, tensors, metadata)
            (folder / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return
    if format == "safetensors":
        if layout is None:
            raise LoraFileError("no universal layout is known for its family; convert to 'diffusers' or 'peft'")
        try:
            tensors = universal_tensors(layers, layout)
        except LoraForgeError as error:
            raise LoraFileError(str(error)) from error
        write_safetensors(path, tensors, metadata, hashes=True)
        return
    write_safetensors(path, diffusers_tensors(layers), metadata)


def with_siblings(layers: Layers) -> tuple[Layers, tuple[str, ...]]:
    """The layers with ones of zeros where readers demand an encoder's whole attention, and what those are called."""
    import torch

    result, padded = dict(layers), []
    for component, own in by_component(layers).items():
        for layer, sibling in missing_siblings(list(own)).items():
            one = own[sibling]
            zeros = (torch.zeros_like(one.down), torch.zeros_like(one.up))
            result[component, layer] = LayerTensors(*zeros, one.alpha, one.alpha_dtype)
            padded.append(f"{component}.{layer}")
    return result, tuple(padded)


def _nearest_float32(alpha: float) -> float:
    """alpha as a float32 if that is within half a unit in the last place, else as it is."""
    nearest = float32(alpha)
    return nearest if abs(nearest - alpha) <= abs(alpha) * 2**-24 else alpha


def _installed_path(component: str, layer: str) -> str:
    """A layer's path in the model of the transformers installed: from 5.6 on, CLIPTextModel has no text_model in it."""
    installed = re.match(r"(\d+)\.(\d+)", version("transformers"))
    flat = installed is not None and (int(installed.group(1)), int(installed.group(2))) >= (5, 6)
    return layer.removeprefix("text_model.") if component == "text_encoder" and flat else layer
