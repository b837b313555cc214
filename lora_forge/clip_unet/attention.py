"""Attention over a text's tokens in 16 bits on a CPU, where torch's fused attention is made for far longer sequences
than 77, and transformers' eager one widens all weights to float32 and back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

_NAME = "lora_forge_short"


def use_short_attention(encoder: Any) -> None:
    """Have an encoder from transformers compute its attention as below; masks are its eager attention's."""
    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, eager_mask)
    encoder.set_attn_implementation(_NAME)


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' attention functions: queries, keys and values `(texts, heads, tokens, width)`, an additive mask
    `(texts, 1, tokens, tokens)`; returns `(texts, tokens, heads, width)`, and no weights.
    """
    # In one piece in memory: a product of many small matrices that are not takes twice as long.
    parts = [part.contiguous() for part in (query, key, value)]
    attended: torch.Tensor = _ShortAttention.apply(*parts, attention_mask, scaling)  # type: ignore[no-untyped-call]
    return attended.transpose(1, 2).contiguous(), None


class _ShortAttention(torch.autograd.Function):
    """softmax(scaling · Q Kᵀ + mask) V as one node of the graph, which keeps the softmax as rounded to its dtype.

    Products, softmax and their gradients are each computed in float32, and then rounded.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        weights = _products(query, key.transpose(2, 3)).mul_(scaling).add_(mask).softmax(dim=-1)
        ctx.save_for_backward(query, key, value, weights)
        ctx.mask, ctx.scaling = mask, scaling
        return _products(weights, value)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        query, key, value, weights = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated in turn
            weights = (query @ key.transpose(2, 3) * ctx.scaling + ctx.mask).softmax(dim=-1)
        gradient = gradients[0].contiguous()
        of_weights = _products(gradient, value.transpose(2, 3))
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype) * ctx.scaling
        of_query, of_key = _products(of_scores, key), _products(of_scores.transpose(2, 3), query)
        return of_query, of_key, _products(weights.transpose(2, 3), gradient), None, None


def _products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The products of matrices in the last two dimensions, `(texts, heads, …)`."""
    product = torch.bmm(left.flatten(0, 1), right.flatten(0, 1))
    return product.view(*left.shape[:2], *product.shape[1:])
