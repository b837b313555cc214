"""The loss that moves a prompt along the direction of a concept."""

from __future__ import annotations

import math

import torch

from lora_forge.batch import Batch
from lora_forge.builtin.text_losses.options import EmbedDirectionOptions
from lora_forge.builtin.text_losses.parts import mean_over_parts, mean_over_tokens


def embed_direction(batch: Batch, options: EmbedDirectionOptions) -> torch.Tensor:
    """mean((c - c₀ - s·d)²) over the prompt's own tokens, averaged over the parts of the conditioning; `(prompts,)`.

    c is a part of the conditioning, c₀ that of the frozen model; d `(prompts, width)` is the mean of c₀ over the tokens
    of the concept, less that over the tokens of the empty prompt; s is the scale.

    ahead: a curriculum. With t = ⟨mean of c - c₀ over the prompt's own tokens, d⟩ / ‖d‖², which is where along d the
    prompt is by now, taken anew at every step and without gradient, the goal is not at s but at
    min(max(t, 0) + ahead, s); for s < 0 the same the other way round. Until it stands at s it stays that far ahead, and
    the pull does not grow with s. The value tells how far it is to the goal of the moment, not to s.

    Source: sliders-conceptmod (ntc-ai) for targets along a concept's direction; the curriculum is ours.
    """
    now, start = batch.conditioning(batch.adapted()), batch.conditioning(batch.frozen())
    own = batch.tokens
    directions = _directions(batch, options.concept)
    values = []
    for part, state in now.items():
        direction, moved = directions[part], state - start[part]
        along = _goal(mean_over_tokens(moved, own).detach(), direction, options)
        goal = (along * direction)[:, None] if state.ndim == 3 else (along * direction).view_as(state)
        values.append(mean_over_tokens((moved - goal).square(), own).mean(dim=1))
    return mean_over_parts(values)


def _directions(batch: Batch, concept: str) -> dict[str, torch.Tensor]:
    """d of each part, `(prompts, width)`."""
    means = []
    for text in (concept, ""):
        parts, tokens = batch.conditioning(batch.encode(text, adapted=False)), batch.tokenize(text)
        means.append({part: mean_over_tokens(state, tokens) for part, state in parts.items()})
    return {part: mean - means[1][part] for part, mean in means[0].items()}


def _goal(moved: torch.Tensor, direction: torch.Tensor, options: EmbedDirectionOptions) -> torch.Tensor:
    """How far along the direction the goal is, `(prompts, 1)`, where the prompt's mean has moved by `moved`."""
    scale = torch.full_like(moved[:, :1], options.scale)
    if options.ahead is None:
        return scale
    sign = math.copysign(1.0, options.scale)
    length = direction.square().sum(dim=1, keepdim=True).clamp_min(1e-12)
    reached = sign * (moved * direction).sum(dim=1, keepdim=True) / length
    return sign * torch.minimum(reached.clamp_min(0) + options.ahead, scale.abs())
