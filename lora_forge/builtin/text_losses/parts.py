"""A text's own tokens: where they are, and what a part of the conditioning is over them.

A part of the conditioning is per token, `(prompts, length, width)`, or one vector for the whole text.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lora_forge.contracts import Tokens


def mean_over_tokens(state: torch.Tensor, tokens: Mapping[str, Tokens]) -> torch.Tensor:
    """The mean of a part over the text's own tokens, start and end included, `(prompts, width)`.

    Padding does not count. A part that is one vector for the whole text is its own mean.
    """
    if state.ndim != 3:
        return state.flatten(1)
    own = _own_tokens(state, tokens).to(state.dtype)[..., None]
    return (state * own).sum(dim=1) / own.sum(dim=1).clamp_min(1)


def state_at_end(state: torch.Tensor, tokens: Mapping[str, Tokens]) -> torch.Tensor:
    """A part at the last of the text's own tokens, which CLIP pools too, `(prompts, width)`.

    A part that is one vector for the whole text is that vector.
    """
    if state.ndim != 3:
        return state.flatten(1)
    last = state.shape[1] - 1 - _own_tokens(state, tokens).long().flip(1).argmax(dim=1)
    return state.gather(1, last[:, None, None].expand(-1, 1, state.shape[2])).squeeze(1)


def mean_square(difference: torch.Tensor) -> torch.Tensor:
    """Mean square of each prompt, over all positions if there are any, `(prompts,)`."""
    return difference.square().flatten(1).mean(dim=1)


def mean_over_parts(values: list[torch.Tensor]) -> torch.Tensor:
    """Each part counts alike, however wide or long it is; `(prompts,)`."""
    return torch.stack(values).mean(dim=0)


def _own_tokens(state: torch.Tensor, tokens: Mapping[str, Tokens]) -> torch.Tensor:
    """Whether a position of a part holds a token of the text itself, `(prompts, length)`.

    Encoders share the positions of what is joined from them, so that of any of them is enough; of a part that is as
    long as no encoder's tokens, every position is the text's.
    """
    masks = [one.attention_mask.bool() for one in tokens.values() if one.attention_mask.shape[1] == state.shape[1]]
    return torch.stack(masks).any(dim=0) if masks else torch.ones_like(state[..., 0], dtype=torch.bool)
