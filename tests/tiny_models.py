"""What tests know of a tiny model from its model config, and of its family's files from the backend's record."""

from __future__ import annotations

import json
from pathlib import Path

from lora_forge.builtin.backends import lora_forge_backends
from lora_forge.records import FileLayout

_CONFIGS = Path(__file__).parent.parent / "model_config"


def target_layers(model: str) -> dict[str, dict[str, tuple[int, int]]]:
    """`[out, in]` of every target layer a model config lists, by component and canonical name."""
    config = json.loads((_CONFIGS / f"{model}_config.json").read_text(encoding="utf-8"))
    start = "layer_dimensions_"
    return {
        key.removeprefix(start): {layer: (size[0], size[1]) for layer, size in sizes.items()}
        for key, sizes in config.items()
        if key.startswith(start)
    }


def encoder_blocks(model: str) -> dict[str, int]:
    """How many blocks each text encoder of a model has."""
    encoders = {name: layers for name, layers in target_layers(model).items() if name.startswith("text_encoder")}
    return {name: 1 + max(int(layer.split(".")[3]) for layer in layers) for name, layers in encoders.items()}


def layout_of(family: str) -> FileLayout:
    """What user interfaces call the layers of a built-in family."""
    (layout,) = [spec.layout for spec in lora_forge_backends() if spec.name == family]
    assert layout is not None
    return layout
