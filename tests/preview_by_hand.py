"""What previews are held against: pictures that diffusers makes, with ΔW added to its weights by hand."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from single_file_checkpoint import write_single_file

from lora_forge.clip_unet.encoders import canonical_name

Key = tuple[str, str]
VAE = "first_stage_model."
_VAE_NAMES: list[tuple[str, Any]] = [
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_", "mid.attn_1."),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", r"up.\1.upsample"),
    (r"up_blocks\.(\d)\.resnets", r"up.\1.block"),
    (r"up\.(\d)", lambda match: f"up.{3 - int(match.group(1))}"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
]


def write_checkpoint(family: str, folder: Path, path: Path) -> Path:
    """A diffusers folder with its VAE in one file, by the names of the original checkpoints."""
    content = load_file(write_single_file(family, folder, path))
    for name, tensor in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").items():
        for pattern, original in _VAE_NAMES:
            name = re.sub(pattern, original, name)
        conv = ".attn_1." in name and name.endswith("weight") and ".norm." not in name
        content[VAE + name] = tensor[..., None, None].contiguous() if conv else tensor
    save_file(content, path)
    return path


def picture(pipe: Any, prompt: str, seed: int, **settings: Any) -> np.ndarray[Any, Any]:
    """One picture `(height, width, 3)` uint8 by a call of the pipeline, as anybody makes it."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    made = pipe(prompt, generator=generator, **{"num_inference_steps": 2, **settings})
    return np.asarray(made.images[0])


def same(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    """Whether two pictures are one: products of weights that lie elsewhere in memory round otherwise on some CPUs."""
    return one.shape == other.shape and int(np.abs(one.astype(int) - other.astype(int)).max()) <= 1


def percent(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """The mean absolute difference of two pictures' numbers, number by number, of the 255 there are."""
    differences = [abs(int(a) - int(b)) for a, b in zip(one.flatten(), other.flatten(), strict=True)]
    return 100 * sum(differences) / len(differences) / 255


@contextmanager
def added(pipe: Any, deltas: Mapping[Key, torch.Tensor], strength: float = 1.0) -> Iterator[None]:
    """Within this the weights are W + strength · ΔW."""
    modules = {
        (component, canonical_name(component, path)): module
        for component in ("text_encoder", "text_encoder_2", "unet")
        for path, module in getattr(pipe, component, torch.nn.Module()).named_modules()
    }
    before = {key: modules[key].weight.detach().clone() for key in deltas}
    with torch.no_grad():
        for key, delta in deltas.items():
            modules[key].weight += strength * delta.reshape(modules[key].weight.shape)
        yield
        for key, weight in before.items():
            modules[key].weight.copy_(weight)
