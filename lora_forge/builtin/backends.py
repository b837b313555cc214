"""Built-in backends."""

from __future__ import annotations

from collections.abc import Iterator

from lora_forge import BackendSpec, FileLayout, hookimpl
from lora_forge.clip_unet.options import CheckpointOptions

# What to write into the metadata: sd-scripts (kohya-ss), and Stability AI's ModelSpec 1.0.1.
_SDXL_LAYOUT = FileLayout(
    prefixes={"text_encoder": "lora_te1", "text_encoder_2": "lora_te2", "unet": "lora_unet"},
    ldm_names=("unet",),
    metadata={
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.resolution": "1024x1024",
    },
)
_SD15_LAYOUT = FileLayout(
    prefixes={"text_encoder": "lora_te", "unet": "lora_unet"},
    metadata={
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.resolution": "512x512",
    },
)


@hookimpl
def lora_forge_backends() -> Iterator[BackendSpec]:
    encoders = ("text_encoder", "text_encoder_2")
    yield BackendSpec(
        name="sdxl",
        summary="Stable Diffusion XL: a Hub id, a diffusers folder, a single-file checkpoint, or tiny_sdxl",
        options=CheckpointOptions,
        factory="lora_forge.builtin.sdxl.backend:open_sdxl",
        recognizes="lora_forge.builtin.sdxl.backend:is_sdxl",
        components=(*encoders, "unet"),
        encoders=encoders,
        reaches={
            "text": encoders,
            "noise_prediction": (*encoders, "unet"),
            "attention": (*encoders, "unet"),
            "vae": (),
        },
        conditioning=("text_encoder penultimate", "text_encoder_2 penultimate", "text_encoder_2 pooled"),
        layout=_SDXL_LAYOUT,
        tiny="tiny_sdxl",
    )
    yield BackendSpec(
        name="sd15",
        summary="Stable Diffusion 1.x: a Hub id, a diffusers folder, a single-file checkpoint, or tiny_sd15",
        options=CheckpointOptions,
        factory="lora_forge.builtin.sd15.backend:open_sd15",
        recognizes="lora_forge.builtin.sd15.backend:is_sd15",
        components=("text_encoder", "unet"),
        encoders=("text_encoder",),
        reaches={
            "text": ("text_encoder",),
            "noise_prediction": ("text_encoder", "unet"),
            "attention": ("text_encoder", "unet"),
            "vae": (),
        },
        conditioning=("text_encoder last",),
        layout=_SD15_LAYOUT,
        tiny="tiny_sd15",
    )
