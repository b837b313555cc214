"""Layers that are only numbered, as cloneofsimo's lora writes them: which layers of Stable Diffusion 1.x they are.

They are numbered as the libraries of that time listed a model's modules. Text encoder: k, v, q and out of each block's
attention. UNet: for each transformer block attn1, the feed-forward's first layer and attn2; the down blocks first, then
the up blocks, and the middle block last. (cloneofsimo/lora, `extract_lora_ups_down`; diffusers' `BasicTransformerBlock`
and transformers' `CLIPAttention` of 2022 and 2023.) The sizes of all layers have to be those of the model, so that no
other model, and no other order, is taken for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

Sizes: TypeAlias = Mapping[int, tuple[int, int] | None]

_WIDTH = 768  # of the text encoder
_WIDTHS = (320, 640, 1280)  # of the UNet, by depth
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def numbered_layers(component: str, sizes: Sizes) -> dict[int, str]:
    """Canonical paths by number; empty where these are not all the layers of Stable Diffusion 1.x.

    sizes: (out, in) of each layer by its number.
    """
    expected = {"text_encoder": _text_encoder, "unet": _unet}.get(component, list)()
    if len(expected) != len(sizes) or any(sizes.get(number) != size for number, (_, size) in enumerate(expected)):
        return {}
    return {number: path for number, (path, _) in enumerate(expected)}


def _text_encoder() -> list[tuple[str, tuple[int, int]]]:
    return [
        (f"text_model.encoder.layers.{block}.self_attn.{projection}_proj", (_WIDTH, _WIDTH))
        for block in range(12)
        for projection in ("k", "v", "q", "out")
    ]


def _unet() -> list[tuple[str, tuple[int, int]]]:
    down = [(f"down_blocks.{depth}", 2, width) for depth, width in enumerate(_WIDTHS)]
    up = [(f"up_blocks.{depth + 1}", 3, width) for depth, width in enumerate(reversed(_WIDTHS))]
    blocks: Sequence[tuple[str, int, int]] = [*down, *up, ("mid_block", 1, _WIDTHS[-1])]
    return [
        (f"{block}.attentions.{attention}.transformer_blocks.0.{path}", size)
        for block, attentions, width in blocks
        for attention in range(attentions)
        for path, size in _transformer_block(width)
    ]


def _transformer_block(width: int) -> list[tuple[str, tuple[int, int]]]:
    context = {"to_k": _WIDTH, "to_v": _WIDTH}
    return [
        *((f"attn1.{name}", (width, width)) for name in _ATTENTION),
        ("ff.net.0.proj", (8 * width, width)),
        *((f"attn2.{name}", (width, context.get(name, width))) for name in _ATTENTION),
    ]
