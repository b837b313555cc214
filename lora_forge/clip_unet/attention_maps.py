"""Cross-attention of a UNet: which token each place of the latent looks at, kept while the UNet runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

_CROSS_ATTENTION = "attn2"  # what diffusers calls it in every transformer block


@contextmanager
def kept_maps(module: nn.Module, maps: dict[str, torch.Tensor]) -> Iterator[None]:
    """Within this, cross-attention in a UNet, or a part of it, leaves its probabilities in `maps`, by its path.

    Each is `(prompts, cells, tokens)` float32, the mean over heads, in autograd's graph. The attention itself goes the
    way it always goes, whatever its processor, so that the UNet's output is the same to the bit.
    """
    layers = [(path, part) for path, part in module.named_modules() if path.rpartition(".")[2] == _CROSS_ATTENTION]
    hooks = [layer.register_forward_hook(partial(_keep, maps, path), with_kwargs=True) for path, layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _keep(
    maps: dict[str, torch.Tensor], path: str, layer: Any, arguments: tuple[Any, ...], settings: dict[str, Any], _: Any
) -> None:
    """softmax(q kᵀ / √d) of a layer's input and the text (Vaswani et al., Attention Is All You Need, eq. 1)."""
    sides = layer.to_q(arguments[0]), layer.to_k(settings["encoder_hidden_states"])
    query, key = (side.float().unflatten(-1, (layer.heads, -1)).transpose(1, 2) for side in sides)
    maps[path] = (query @ key.transpose(-1, -2) * layer.scale).softmax(dim=-1).mean(dim=1)


def unflattened(map_: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """`(prompts, cells, tokens)` as `(prompts, height, width, tokens)`, of a latent of this height and width.

    A UNet halves both sides, rounding up, until the cells come out.
    """
    while height * width > map_.shape[1]:
        height, width = (height + 1) // 2, (width + 1) // 2
    return map_.view(len(map_), height, width, -1)
