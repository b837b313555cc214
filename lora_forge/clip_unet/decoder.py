"""From latents to pictures: a family's VAE, frozen, in float32 whatever the rest runs in."""

from __future__ import annotations

import copy
from typing import Any

import torch

from lora_forge.clip_unet.family import VAE
from lora_forge.clip_unet.pipeline import load_model
from lora_forge.clip_unet.sources import Source
from lora_forge.errors import ModelError


def load_decoder(source: Source, device: str) -> Any:
    """The VAE of a model's files. In float32, since SDXL's overflows in float16. Raises ModelError."""
    return load_model(source, VAE, torch.float32).to(device)


def copied_decoder(pipeline: Any) -> Any:
    """A copy of the VAE of a pipeline in memory, whose own stays as it is. Raises ModelError if it has none."""
    vae = getattr(pipeline, VAE, None)
    if not isinstance(vae, torch.nn.Module):
        raise ModelError(f"the {type(pipeline).__name__} in memory has no {VAE}")
    return copy.deepcopy(vae).float().requires_grad_(False).eval()


def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Pictures `(prompts, 3, height, width)` float32 in [0, 1] of latents as the UNet has them.

    The gradient flows to the latents, where a value is not cut off at 0 or 1.
    """
    picture = vae.decode(latents.to(vae.device, torch.float32) / vae.config.scaling_factor, return_dict=False)[0]
    return (picture / 2 + 0.5).clamp(0, 1)  # type: ignore[no-any-return]
