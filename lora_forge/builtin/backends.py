"""Built-in backends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lora_forge import BackendSpec, hookimpl


@dataclass(frozen=True)
class SdxlOptions:
    """Options of `sdxl`."""

    config: Path | None = field(
        default=None,
        metadata={
            "help": "folder with configs and tokenizers for a single-file checkpoint; SDXL base 1.0's by default"
        },
    )


@hookimpl
def lora_forge_backends() -> Iterator[BackendSpec]:
    encoders = ("text_encoder", "text_encoder_2")
    yield BackendSpec(
        name="sdxl",
        summary="Stable Diffusion XL: a Hub id, a diffusers folder, a single-file checkpoint, or tiny_sdxl",
        options=SdxlOptions,
        factory="lora_forge.builtin.sdxl.backend:open_sdxl",
        components=("text_encoder", "text_encoder_2", "unet"),
        encoders=encoders,
        reaches={"text": encoders, "noise_prediction": (*encoders, "unet")},
        tiny="tiny_sdxl",
    )
