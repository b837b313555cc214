"""tiny_sdxl: a complete SDXL of small dimensions with deterministic random weights, made on the spot.

Every class, config key and file of the real one is there, so that every command, test and example runs
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

from lora_forge.errors import ModelError
from lora_forge.seeds import layer_generator

if TYPE_CHECKING:
    import torch

TINY = "tiny_sdxl"
_CONFIGS = Path(__file__).parent / "configs"
_RECIPE = 1  # raise it when the same dimensions should get other weights
_DIMENSIONS: dict[str, dict[str, Any]] = {
    "text_encoder": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "projection_dim": 32,
    },
    "text_encoder_2": {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_attention_heads": 3,
        "num_hidden_layers": 4,
        "projection_dim": 48,
    },
    "unet": {
        "block_out_channels": [32, 64, 64],
        "attention_head_dim": [2, 4, 4],
        "transformer_layers_per_block": [1, 1, 2],
        "norm_num_groups": 8,
        "cross_attention_dim": 80,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 96,
        "sample_size": 8,
    },
    "vae": {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4, "sample_size": 64},
}
_FILES = {"text_encoder": "model", "text_encoder_2": "model", "unet": "diffusion_pytorch_model"}


def cache_folder() -> Path:
    """Where things made once are kept: `$LORA_FORGE_CACHE`, or `lora-forge` in the user's cache."""
    chosen = os.environ.get("LORA_FORGE_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-forge"


def tiny_sdxl_folder() -> Path:
    """The folder of tiny_sdxl in diffusers' format, made on first use. Raises ModelError if it cannot be."""
    digest = hashlib.sha256(json.dumps([_RECIPE, _DIMENSIONS], sort_keys=True).encode()).hexdigest()[:8]
    folder = cache_folder() / f"{TINY}-{digest}"
    if (folder / "model_index.json").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{TINY}-") as temporary:
            made = Path(temporary) / TINY
            _build(made)
            try:
                made.rename(folder)
            except OSError:
                if not (folder / "model_index.json").is_file():  # else another process was first
                    raise
    except OSError as error:
        raise ModelError(f"{TINY} cannot be made in {str(folder.parent)!r}: {error.strerror}") from error
    return folder


def _build(folder: Path) -> None:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from safetensors.torch import save_file

    from lora_forge.builtin.sdxl.encoders import canonical_name, empty_encoder

    shutil.copytree(_CONFIGS, folder)
    for component, dimensions in _DIMENSIONS.items():
        path = folder / component / "config.json"
        config = {**json.loads(path.read_text(encoding="utf-8")), **dimensions}
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if component.startswith("text"):
            module: Any = empty_encoder(component, config)
        else:
            with torch.device("meta"):
                module = (UNet2DConditionModel if component == "unet" else AutoencoderKL).from_config(config)
        weights = {}
        for name, parameter in module.named_parameters():
            name = canonical_name(component, name) if component.startswith("text") else name
            weights[name] = _random_weight(component, name, parameter.shape)
        file = _FILES.get(component, "diffusion_pytorch_model")
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
