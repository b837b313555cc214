"""Whether components are those of a family, and free to be worked on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lora_forge.clip_unet.family import Family
from lora_forge.errors import ModelError

CLIP = "clip_text_model"  # what transformers calls the kind
_UNET_CLASS = "UNet2DConditionModel"


def pipeline_components(pipeline: Any, family: Family) -> list[tuple[str, Any]]:
    components = [(name, getattr(pipeline, name, None)) for name in family.components]
    missing = [name for name, module in components if not isinstance(module, nn.Module)]
    named = f"{type(pipeline).__name__} is no {family.title} pipeline"
    if missing:
        raise ModelError(f"{named}: it has no {', '.join(missing)}")
    reasons = [foreign_unet(pipeline.unet.config, family)]
    reasons += [foreign_encoder(name, getattr(pipeline, name).config.model_type) for name in family.encoders]
    if any(reasons):
        raise ModelError(f"{named}: {next(filter(None, reasons))}")
    for name, module in components:
        check_bare(name, module)
    return components


def foreign_unet(config: Mapping[str, Any], family: Family) -> str:
    """Why a UNet of this config is none of the family's, or ""."""
    made_of = config.get("_class_name", _UNET_CLASS)
    if made_of != _UNET_CLASS:
        return f"its UNet is a {made_of}, not a {_UNET_CLASS}"
    return family.foreign(config)


def foreign_encoder(component: str, model_type: str) -> str:
    return "" if model_type == CLIP else f"its {component} is of the kind {model_type!r}, not {CLIP!r}"


def check_bare(component: str, module: Any) -> None:
    if hasattr(module, "_hf_hook"):
        raise ModelError(f"{component} is offloaded; a pipeline in memory has to be on one device")
    if hasattr(module, "peft_config"):
        raise ModelError(f"{component} already carries a LoRA; unload it first (pipe.unload_lora_weights())")
