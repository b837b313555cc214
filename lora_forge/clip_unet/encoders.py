"""Building the CLIP text encoders: on the meta device for their shape, or with weights read straight in."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lora_forge.clip_unet.attention import use_short_attention
from lora_forge.clip_unet.family import UNET, ClipEncoder
from lora_forge.clip_unet.sources import Source
from lora_forge.errors import ModelError
from lora_forge.frozen import freeze

_BYTES_PER_MAPPING = 128 * 2**20


def canonical_name(component: str, name: str) -> str:
    """A module or parameter path as published checkpoints have it.

    transformers 5.6 dropped the `text_model` level of `CLIPTextModel`, and kept that of
    `CLIPTextModelWithProjection`.
    """
    if component == UNET or name.startswith(("text_model.", "text_projection")):
        return name
    return f"text_model.{name}"


def empty_encoder(kind: ClipEncoder, config: dict[str, Any]) -> nn.Module:
    """The encoder on the meta device: its modules and shapes, no numbers."""
    made: Any = CLIPTextModelWithProjection if kind.projection else CLIPTextModel
    with torch.device("meta"):
        encoder: nn.Module = made(CLIPTextConfig.from_dict(config))
    return encoder


def load_encoder(component: str, kind: ClipEncoder, source: Source, *, device: str, dtype: torch.dtype) -> nn.Module:
    """The encoder, frozen, each parameter going straight from the mapped file to its device and dtype.

    Raises ModelError when a parameter is missing or has another shape.
    """
    encoder = empty_encoder(kind, source.config(component))
    wanted = defaultdict(list)  # key in the file: [(parameter, its name, how to take it)]
    for name, parameter in encoder.named_parameters():
        key, take = source.locate(component, canonical_name(component, name))
        wanted[key].append((name, parameter.shape, take))
    for file in source.weight_files(component):
        _read_into(encoder, component, file, wanted, device, dtype)
    if wanted:
        raise ModelError(f"base model {source.name!r}: {component} lacks {next(iter(wanted))!r}")
    for name, buffer in encoder.named_buffers():
        if buffer.is_meta:  # position_ids, which no checkpoint carries
            _set(encoder, name, torch.arange(buffer.shape[-1], device=device).expand(buffer.shape))
    return encoder.requires_grad_(False).eval()


def ready_for_steps(encoder: Any) -> nn.Module:
    """An encoder of our own, as fast as it gets at the gradients of its activations; none of a weight is wanted."""
    parameter = next(encoder.parameters())
    if parameter.device.type == "cpu" and parameter.dtype is not torch.float32:
        # The gradient of torch's fused attention takes four times as long in 16 bits as in 32, on a CPU.
        use_short_attention(encoder)
    return freeze(encoder)


def _read_into(
    encoder: nn.Module, component: str, file: Path, wanted: dict[str, Any], device: str, dtype: torch.dtype
) -> None:
    """Move what `file` has of `wanted` into the encoder, in chunks, each with a memory map of its own.

    Pages of a map count as this process's memory while it is open; chunks keep the peak at the weights' size.
    """
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        keys = [key for key in opened.offset_keys() if _wanted_key(key, wanted)]
    while keys:
        with safe_open(file, framework="pt") as opened:
            size = 0
            while keys and size < _BYTES_PER_MAPPING:
                key = keys.pop(0)
                tensor = opened.get_tensor(key)
                size += tensor.nbytes
                for name, shape, take in wanted.pop(_wanted_key(key, wanted) or key):
                    value = take(tensor)
                    if value.shape != shape:
                        sizes = f"shape {list(value.shape)}, its config says {list(shape)}"
                        raise ModelError(f"{file.name}: {component}.{name} has {sizes}")
                    _set(encoder, name, nn.Parameter(value.to(device, dtype, copy=True), requires_grad=False))
                del tensor


def _wanted_key(key: str, wanted: dict[str, Any]) -> str | None:
    return next((name for name in (key, f"text_model.{key}") if name in wanted), None)


def _set(model: nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if isinstance(value, nn.Parameter):
        owner._parameters[leaf] = value
    else:
        owner._buffers[leaf] = value
