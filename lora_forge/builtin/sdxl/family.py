"""What SDXL is, as data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_forge.builtin.sdxl.single_file import single_file_location
from lora_forge.clip_unet.family import ClipEncoder, Family, TinyModel

_TINY = TinyModel(
    name="tiny_sdxl",
    dimensions={
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
    },
)


def _foreign(unet: Mapping[str, Any]) -> str:
    if unet.get("addition_embed_type") == "text_time":
        return ""
    return "its UNet takes no pooled projection and no image size (addition_embed_type is not text_time)"


SDXL = Family(
    name="sdxl",
    title="SDXL",
    encoders={
        "text_encoder": ClipEncoder(tokenizer="tokenizer", projection=False),
        "text_encoder_2": ClipEncoder(tokenizer="tokenizer_2", projection=True),
    },
    pipeline="StableDiffusionXLPipeline",
    configs=Path(__file__).parent / "configs",
    location=single_file_location,
    foreign=_foreign,
    tiny=_TINY,
)
