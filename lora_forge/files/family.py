"""What a LoRA file says it is a LoRA of: in its own record, else in its metadata, else by its layers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_forge.files.names import RECORD_KEY

if TYPE_CHECKING:
    from lora_forge.files.lora_file import FileLayer

FAMILY_KEY = "lora_forge_family"  # of the metadata: the family of a file that has no run's record to tell it
SHIPPED = "lora-forge"  # the distribution of the families that ship, which go by their bare name
_WIDTHS = {"text_encoder": {1024: "sd2"}, "unet": {768: "sd15", 1024: "sd2", 2048: "sdxl"}}
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,99}\Z")


def recorded_run(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """What a file's record says of the run that made it; empty without one, or where it is not legible."""
    try:
        run = json.loads(metadata.get(RECORD_KEY, "{}"))["run"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return {}
    return run if isinstance(run, dict) else {}


def recorded_family(metadata: Mapping[str, str]) -> str | None:
    """The backend that a file was made with: its name, as `distribution:name` if it does not ship; None if not told."""
    backend = recorded_run(metadata).get("backend")
    if isinstance(backend, dict):
        distribution, name = backend.get("distribution"), backend.get("name")
    else:
        distribution, _, name = metadata.get(FAMILY_KEY, "").rpartition(":")
        distribution = distribution or SHIPPED
    if not isinstance(distribution, str) or not isinstance(name, str):
        return None
    if not distribution.isprintable() or ":" in distribution or len(distribution) > 100 or not _NAME.match(name):
        return None
    return name if distribution == SHIPPED else f"{distribution}:{name}"


def told_family(metadata: Mapping[str, str]) -> str | None:
    """Which of the families that everybody knows other tools' metadata names."""
    version, architecture = metadata.get("ss_base_model_version", ""), metadata.get("modelspec.architecture", "")
    if version.startswith("sdxl") or architecture.startswith("stable-diffusion-xl"):
        return "sdxl"
    if version.startswith("sd_v2") or metadata.get("ss_v2") == "True" or architecture.startswith("stable-diffusion-v2"):
        return "sd2"
    if version.startswith("sd_v1") or architecture.startswith("stable-diffusion-v1"):
        return "sd15"
    return None


def family_of_layers(layers: Sequence[FileLayer]) -> str | None:
    """Which of them the layers there are, their sizes and their names belong to."""
    if any(layer.component == "text_encoder_2" for layer in layers):
        return "sdxl"
    for layer in layers:
        shape = layer.shape
        # Where layers are only numbered, no other layer of a UNet has such a width.
        cross = layer.layer is None or layer.layer.endswith((".attn2.to_k", ".attn2.to_v"))
        if shape and (layer.component == "text_encoder" or (layer.component == "unet" and cross)):
            known = _WIDTHS[layer.component].get(shape[1])
            if known:
                return known
    if any(layer.name.startswith("lora_te_") for layer in layers):
        return "sd15"
    return "sdxl" if any(layer.name.startswith(("lora_te1_", "lora_te2_")) for layer in layers) else None
