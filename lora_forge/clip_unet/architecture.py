"""The linear layers a component has, read off its config, without its weights.

diffusers takes longer to import than all else of a run that needs no UNet. So what a UNet's config comes to is worked
out once, and kept in the cache.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn

from lora_forge.clip_unet.encoders import canonical_name, empty_encoder
from lora_forge.clip_unet.family import ClipEncoder
from lora_forge.clip_unet.tiny import cache_folder
from lora_forge.errors import ModelError

Layers: TypeAlias = dict[str, tuple[int, int]]
_FORMAT = 1  # raise it when the same config should come to other layers


def linear_layers(component: str, module: nn.Module) -> Layers:
    """A component's linear layers by canonical name, `(out, in)` of each, in the module's own order."""
    return {
        canonical_name(component, name): (layer.out_features, layer.in_features)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    }


@functools.lru_cache(maxsize=16)
def layers_of_config(component: str, kind: ClipEncoder | None, config: str) -> Layers:
    """The linear layers of what a config makes: of a text encoder of this kind, or of a UNet.

    config: as JSON. Raises ModelError when it makes none.
    """
    if kind:
        return _built(component, kind, config)
    file = _place_of(config)
    layers = _kept(file) if file else None
    if layers is None:
        layers = _built(component, kind, config)
        if file:
            _keep(file, layers)
    return layers


def _built(component: str, kind: ClipEncoder | None, config: str) -> Layers:
    """From the component itself, on the meta device."""
    try:
        if kind:
            module = empty_encoder(kind, json.loads(config))
        else:
            from diffusers import UNet2DConditionModel

            with torch.device("meta"):
                module = UNet2DConditionModel.from_config(json.loads(config))
    except Exception as error:
        reason = " ".join(str(error).split())  # the library's own, of many lines
        raise ModelError(f"{component}: its config.json makes no model: {reason}") from error
    return linear_layers(component, module)


def _place_of(config: str) -> Path | None:
    """Where the layers of a UNet are kept: elsewhere for another config, or another diffusers."""
    made_of = json.dumps([_FORMAT, version("diffusers"), config])
    try:
        return cache_folder() / "layers" / f"unet-{hashlib.sha256(made_of.encode()).hexdigest()[:32]}.json"
    except RuntimeError:  # a user without a home
        return None


def _kept(file: Path) -> Layers | None:
    """What is kept there, if it is there and as it was written."""
    try:
        digest, _, text = file.read_text(encoding="utf-8").partition("\n")
    except (OSError, ValueError):
        return None
    if digest != hashlib.sha256(text.encode()).hexdigest():
        return None
    return {name: (size[0], size[1]) for name, size in json.loads(text).items()}


def _keep(file: Path, layers: Layers) -> None:
    """Keep them for the next run. One whose cache cannot be written goes without."""
    text = json.dumps(layers)
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".") as temporary:
            made = Path(temporary) / file.name
            made.write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}", encoding="utf-8")
            os.replace(made, file)  # whole, whoever reads or writes it meanwhile
