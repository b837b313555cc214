"""A loss on where the denoiser looks for each word."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch.nn import functional

from lora_forge.batch import Batch
from lora_forge.errors import ObjectiveError
from lora_forge_diffusion.denoising import noisy_latents
from lora_forge_diffusion.options import AttendExciteOptions

_SIGMA = 0.5  # of the smoothing, in places; the kernel is 3 by 3


def attend_excite(batch: Batch, options: AttendExciteOptions) -> torch.Tensor:
    """Max over content tokens of 1 - max over places of the smoothed cross-attention, `(prompts,)` in [0, 1].

    Attention is averaged over heads and layers of the chosen resolution; the start token's is left out and the others'
    shared out anew by softmax(sharpness · attention), since the start token takes nearly all of it. Content tokens are
    those of the prompt itself: neither start, end nor padding. A prompt without any has the value 0.

    Source: Chefer et al., Attend-and-Excite, arXiv:2301.13826, eq. 2 and algorithm 1. There the latents of one picture
    are moved; here the weights. Smoothing repeats the map's border, where the authors' code mirrors it.
    """
    own = batch.adapted()
    latents, timesteps = noisy_latents(batch, own, options)
    maps = _mean_of_nearest(batch.cross_attention(latents, timesteps, own, adapted=True), options.resolution)
    content = _content(batch)
    if content.shape[1] != maps.shape[-1]:
        raise ObjectiveError(
            f"attend_excite looks at tokens one by one: this model attends to {maps.shape[-1]} of them, and its text "
            f"encoders read {content.shape[1]}"
        )
    attended = _smoothed((options.sharpness * maps[..., 1:]).softmax(dim=-1)).amax(dim=(1, 2))
    return torch.where(content[:, 1:], 1 - attended, 0.0).amax(dim=1)


def _mean_of_nearest(maps: Mapping[str, torch.Tensor], resolution: int) -> torch.Tensor:
    """Mean `(prompts, height, width, tokens)` of the maps whose side is nearest to the resolution, by its ratio."""

    def distance(size: tuple[int, int]) -> float:
        return abs(math.log(math.sqrt(size[0] * size[1]) / resolution))

    sizes = {path: (one.shape[1], one.shape[2]) for path, one in maps.items()}
    chosen = min(sizes.values(), key=distance)
    return torch.stack([maps[path] for path, size in sizes.items() if size == chosen]).mean(dim=0)


def _content(batch: Batch) -> torch.Tensor:
    """Which positions hold a token of the prompt itself, in any encoder, `(prompts, length)` bool."""
    inside = []
    for tokens in batch.tokens.values():
        position = torch.arange(tokens.attention_mask.shape[1], device=tokens.attention_mask.device)
        length = tokens.attention_mask.sum(dim=1, keepdim=True)
        inside.append((position > 0) & (position < length - 1))
    return torch.stack(inside).any(dim=0)


def _smoothed(maps: torch.Tensor) -> torch.Tensor:
    """Each token's map under a Gaussian of 3 by 3 places, `(prompts, height, width, tokens)`."""
    line = torch.exp(-torch.tensor([-1.0, 0.0, 1.0], device=maps.device).square() / (2 * _SIGMA**2)).to(maps)
    kernel = torch.outer(line, line) / line.sum().square()
    prompts, height, width, tokens = maps.shape
    pictures = maps.permute(0, 3, 1, 2).reshape(prompts * tokens, 1, height, width)
    padded = functional.pad(pictures, (1, 1, 1, 1), mode="replicate")
    smooth = functional.conv2d(padded, kernel[None, None])
    return smooth.view(prompts, tokens, height, width).permute(0, 2, 3, 1)
