"""The SDXL backend: a UNet conditioned on two text encoders, on a pooled projection, and on the image's size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lora_forge.builtin.sdxl.family import SDXL
from lora_forge.clip_unet.backend import ClipUnetBackend
from lora_forge.clip_unet.options import CheckpointOptions
from lora_forge.contracts import Backend, BackendRequest, EncoderOutput


def open_sdxl(request: BackendRequest, options: CheckpointOptions) -> Backend:
    """An SDXL from its files, or around a pipeline in memory. Raises ModelError."""
    return SdxlBackend.open(request, options.config, gradient_checkpointing=options.gradient_checkpointing)


def is_sdxl(source: str) -> bool:
    """Whether a source is an SDXL. Raises ModelError saying why not."""
    return SdxlBackend.recognizes(source)


class SdxlBackend(ClipUnetBackend):
    """See `Backend`."""

    facts = SDXL

    def conditioning(self, outputs: Mapping[str, EncoderOutput]) -> dict[str, torch.Tensor]:
        parts = {f"{encoder} penultimate": output.penultimate_hidden_state for encoder, output in outputs.items()}
        if "text_encoder_2" in outputs:
            parts["text_encoder_2 pooled"] = outputs["text_encoder_2"].pooled
        return parts

    def unet_arguments(self, latents: torch.Tensor, outputs: Mapping[str, EncoderOutput]) -> dict[str, Any]:
        states = torch.cat([outputs[encoder].penultimate_hidden_state for encoder in SDXL.encoders], dim=-1)
        # The pipeline's own micro-conditioning: original size, crop, target size, all uncropped. One latent
        # pixel of SDXL's VAE is eight of the image.
        side = 8.0 * latents.shape[-1]
        sizes = torch.tensor([[side, side, 0.0, 0.0, side, side]]).to(latents).expand(len(latents), -1)
        pooled = outputs["text_encoder_2"].pooled
        return {
            "encoder_hidden_states": states.to(latents),
            "added_cond_kwargs": {"text_embeds": pooled.to(latents), "time_ids": sizes},
        }
