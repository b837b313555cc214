"""What Stable Diffusion 1.x is, as data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_forge.clip_unet.family import ClipEncoder, Family, Take, TinyModel, whole

_TINY = TinyModel(
    name="tiny_sd15",
    dimensions={
        "text_encoder": {
            "hidden_size": 40,
            "intermediate_size": 80,
            "num_attention_heads": 2,
            "num_hidden_layers": 3,
            "projection_dim": 40,
        },
        "unet": {
            "block_out_channels": [16, 32, 32, 32],
            "attention_head_dim": 4,
            "norm_num_groups": 8,
            "cross_attention_dim": 40,
            "sample_size": 8,
        },
        "vae": {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4, "sample_size": 64},
    },
)


def _location(component: str, canonical: str) -> tuple[str, Take]:
    """Source of the name: CompVis latent-diffusion."""
    return f"cond_stage_model.transformer.{canonical}", whole


def _foreign(unet: Mapping[str, Any]) -> str:
    # Stable Diffusion 2 and XL have the same blocks, and another text encoder or two.
    if unet.get("use_linear_projection"):
        return "its UNet projects into its attention blocks with linear layers, as Stable Diffusion 2 and XL do"
    return ""


SD15 = Family(
    name="sd15",
    title="Stable Diffusion 1.x",
    encoders={"text_encoder": ClipEncoder(tokenizer="tokenizer", projection=False)},
    pipeline="StableDiffusionPipeline",
    configs=Path(__file__).parent / "configs",
    location=_location,
    foreign=_foreign,
    tiny=_TINY,
)
