"""What PEFT's config says of alpha, in a folder's `adapter_config.json` or in the metadata diffusers writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_forge.errors import LoraFileError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# What lora-forge writes of a config, and no more.
WRITTEN = {"peft_type", "r", "lora_alpha", "target_modules", "bias", "lora_dropout", "inference_mode"}
_LARGEST = 2**20  # bytes; a config that names every layer of SDXL takes a tenth


@dataclass(frozen=True)
class AdapterConfig:
    """alpha, and by a layer's path or its end another one for it. rslora: ΔW is scaled by alpha / √rank."""

    alpha: float
    patterns: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False

    def alpha_of(self, layer: str, rank: int | None) -> float:
        """A layer's alpha, such that alpha / rank is what ΔW is scaled by. Patterns are read as plain paths."""
        parts = layer.split(".")
        ends = (".".join(parts[start:]) for start in range(len(parts)))
        alpha = next((self.patterns[end] for end in ends if end in self.patterns), self.alpha)
        return alpha * rank**0.5 if self.rslora and rank else alpha


def read_config(file: Path) -> AdapterConfig | None:
    """The config beside a weight file of a PEFT folder; None where there is none. Raises LoraFileError."""
    config = file.parent / CONFIG
    if file.name != WEIGHTS or not config.is_file():
        return None
    try:
        with config.open("rb") as stream:
            return _config(json.loads(stream.read(_LARGEST)))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, OSError) as error:
        raise LoraFileError(f"{str(config)!r} is no config of a LoRA: its lora_alpha cannot be read") from error


def read_metadata_configs(metadata: Mapping[str, str]) -> dict[str, AdapterConfig]:
    """By component, what recent diffusers stores in a file's metadata; nothing where that is not legible."""
    told: dict[str, dict[str, Any]] = {}
    try:
        for key, value in json.loads(metadata.get("lora_adapter_metadata", "{}")).items():
            component, _, name = key.partition(".")
            told.setdefault(component, {})[name] = value
        return {component: _config(data) for component, data in told.items() if "lora_alpha" in data}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}


def _config(data: Any) -> AdapterConfig:
    patterns = {str(layer): float(alpha) for layer, alpha in (data.get("alpha_pattern") or {}).items()}
    return AdapterConfig(float(data["lora_alpha"]), patterns, data.get("use_rslora") is True)


def is_own(path: Path) -> bool:
    """Whether a config says what lora-forge writes and nothing else; PEFT's own says more."""
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")).keys() == WRITTEN)
    except (OSError, ValueError, AttributeError, RecursionError):
        return False
