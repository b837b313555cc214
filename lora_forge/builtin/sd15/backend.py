"""The Stable Diffusion 1.x backend: a UNet conditioned on one text encoder's last hidden state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lora_forge.builtin.sd15.family import SD15
from lora_forge.clip_unet.backend import ClipUnetBackend
from lora_forge.clip_unet.options import CheckpointOptions
from lora_forge.contracts import Backend, BackendRequest, EncoderOutput


def open_sd15(request: BackendRequest, options: CheckpointOptions) -> Backend:
    """A Stable Diffusion 1.x from its files, or around a pipeline in memory. Raises ModelError."""
    return Sd15Backend.open(request, options.config, gradient_checkpointing=options.gradient_checkpointing)


def is_sd15(source: str) -> bool:
    """Whether a source is a Stable Diffusion 1.x. Raises ModelError saying why not."""
    return Sd15Backend.recognizes(source)


class Sd15Backend(ClipUnetBackend):
    """See `Backend`."""

    facts = SD15

    def conditioning(self, outputs: Mapping[str, EncoderOutput]) -> dict[str, torch.Tensor]:
        return {f"{encoder} last": output.last_hidden_state for encoder, output in outputs.items()}

    def unet_arguments(self, latents: torch.Tensor, outputs: Mapping[str, EncoderOutput]) -> dict[str, Any]:
        return {"encoder_hidden_states": outputs["text_encoder"].last_hidden_state.to(latents)}
