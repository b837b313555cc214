"""A family's tiny model: complete, of small dimensions with deterministic random weights, made on the spot.

Every class, config key and file of a real one is there, so that every command, test and example runs
without a download. Its pictures are noise.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_forge.clip_unet.family import UNET, Family
from lora_forge.errors import ModelError
from lora_forge.seeds import layer_generator

if TYPE_CHECKING:
    import torch

_RECIPE = 2  # raise it when the same dimensions should make other files


def cache_folder() -> Path:
    """Where things made once are kept: `$LORA_FORGE_CACHE`, or `lora-forge` in the user's cache."""
    chosen = os.environ.get("LORA_FORGE_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-forge"


def tiny_folder(family: Family) -> Path:
    """The diffusers folder of a family's tiny model, made on first use. Raises ModelError if it cannot be."""
    name = family.tiny.name
    folder = cache_folder() / f"{name}-{_recipe(family)}"
    if (folder / "model_index.json").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as temporary:
            made = Path(temporary) / name
            _build(family, made)
            try:
                made.rename(folder)
            except OSError:
                if not (folder / "model_index.json").is_file():  # else another process was first
                    raise
    except OSError as error:
        raise ModelError(f"{name} cannot be made in {str(folder.parent)!r}: {error.strerror}") from error
    return folder


def _recipe(family: Family) -> str:
    """Eight digits that are others when the model would be: all that it is made from."""
    kinds = {component: encoder.projection for component, encoder in family.encoders.items()}
    digest = hashlib.sha256(json.dumps([_RECIPE, kinds, family.tiny.dimensions], sort_keys=True).encode())
    for path in sorted(path for path in family.configs.rglob("*") if path.is_file()):
        digest.update(path.relative_to(family.configs).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def _build(family: Family, folder: Path) -> None:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from safetensors.torch import save_file

    from lora_forge.clip_unet.encoders import canonical_name, empty_encoder

    shutil.copytree(family.configs, folder)
    for component, dimensions in family.tiny.dimensions.items():
        path = folder / component / "config.json"
        config = {**json.loads(path.read_text(encoding="utf-8")), **dimensions}
        config.pop("_diffusers_version", None)  # of an old one, pipelines take a small sample_size for a mistake
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        encoder = family.encoders.get(component)
        if encoder:
            module: Any = empty_encoder(encoder, config)
        else:
            with torch.device("meta"):
                module = (UNet2DConditionModel if component == UNET else AutoencoderKL).from_config(config)
        weights = {}
        for name, parameter in module.named_parameters():
            name = canonical_name(component, name) if encoder else name
            weights[name] = _random_weight(component, name, parameter.shape)
        file = "model" if encoder else "diffusion_pytorch_model"
        save_file(weights, folder / component / f"{file}.safetensors", metadata={"format": "pt"})


def _random_weight(component: str, name: str, shape: torch.Size) -> torch.Tensor:
    """float16, of a size that keeps activations near one: as training leaves them, not as init does."""
    import torch

    values = torch.randn(shape, generator=layer_generator(0, component, name))
    if name.endswith("bias"):
        values *= 0.02
    elif "norm" in name:
        values = 1 + 0.1 * values
    elif "embedding" in name and component.startswith("text"):
        values *= 0.5
    else:
        values /= (shape.numel() / shape[0]) ** 0.5
    return values.half()
