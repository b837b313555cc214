"""Where a pipeline that was just read goes: to its device whole, or in turn, part by part, where memory is short."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_forge.preview.render import Size

# What one image takes beside the weights, in bytes per pixel, generously: decoding by the VAE in float32, which is most
# of it, and the denoiser's activations. Decoded in tiles, it is no more than the denoiser's.
_WHOLE, _TILED = 10 * 2**10, 3 * 2**10
_USUAL: Size = (1024, 1024)


@dataclass(frozen=True)
class Placement:
    """tiled: the VAE decodes in tiles, and image by image. offloaded: parts are on the device one at a time."""

    tiled: bool = False
    offloaded: bool = False


def placement(weights: int, free: int, size: Size | None) -> Placement:
    """What fits: weights and free memory in bytes, an image of `size` pixels, (1024, 1024) where that is not known."""
    width, height = size or _USUAL
    if weights + width * height * _WHOLE <= free:
        return Placement()
    return Placement(tiled=True, offloaded=weights + width * height * _TILED > free)


def place(pipeline: Any, device: str, size: Size | None) -> Placement:
    """Put a pipeline of one's own, on the CPU, where it makes images of `size` on `device`."""
    if not device.startswith("cuda"):
        pipeline.to(device)
        return Placement()
    import torch

    chosen = placement(weight_bytes(pipeline), torch.cuda.mem_get_info(device)[0], size or own_size(pipeline))
    vae: Any = getattr(pipeline, "vae", None)
    if chosen.tiled and hasattr(vae, "enable_tiling"):
        vae.enable_tiling()
        vae.enable_slicing()
    if chosen.offloaded:
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)
    return chosen


def weight_bytes(pipeline: Any) -> int:
    """Of all parameters and buffers of all parts, those that several share counted once."""
    from torch import nn

    modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    tensors = {id(one): one.nbytes for module in modules for one in (*module.parameters(), *module.buffers())}
    return sum(tensors.values())


def own_size(pipeline: Any) -> Size | None:
    """The size of the pipeline's images where none is asked for; None where it does not tell."""
    side = getattr(pipeline, "default_sample_size", None)
    if side is None:
        side = getattr(getattr(getattr(pipeline, "unet", None), "config", None), "sample_size", None)
    factor = getattr(pipeline, "vae_scale_factor", None)
    if not isinstance(side, int) or not isinstance(factor, int):
        return None
    return side * factor, side * factor
