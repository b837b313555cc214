"""Losses that make what a prompt is encoded as larger."""

from __future__ import annotations

import torch

from lora_forge.batch import Batch
from lora_forge.builtin.text_losses.options import ConditioningMagnitudeOptions, EmbeddingMagnitudeOptions
from lora_forge.builtin.text_losses.parts import mean_over_parts, mean_over_tokens


def embedding_magnitude(batch: Batch, options: EmbeddingMagnitudeOptions) -> torch.Tensor:
    """-mean(|h|) of each encoder, averaged over encoders; `(prompts,)`.

    h is the last or the penultimate hidden state, the mean over all positions, padding included, or over the prompt's
    own tokens. The attention mask is passed to the encoder. Of the last one, mean(|h|) ≤ √mean(γ²) + mean(|β|), with γ
    and β those of the final LayerNorm. Source: ours.
    """
    means = []
    for encoder, output in batch.adapted(masked=True).items():
        last = options.layer == "last"
        size = (output.last_hidden_state if last else output.penultimate_hidden_state).abs()
        if options.tokens == "all":
            means.append(size.mean(dim=(1, 2)))
        else:
            means.append(mean_over_tokens(size, {encoder: batch.tokens[encoder]}).mean(dim=1))
    return -sum(means[1:], means[0]) / len(means)


def conditioning_magnitude(batch: Batch, options: ConditioningMagnitudeOptions) -> torch.Tensor:
    """-mean(|c|) + anchor · mean((c - c₀)²) / mean(c₀²), averaged over the parts of the conditioning; `(prompts,)`.

    c is a part of the conditioning, c₀ that of the frozen model, both unmasked as the pipeline encodes; the means are
    over the prompt's own tokens, padding left out. Source: ours.
    """
    now, start = batch.conditioning(batch.adapted()), batch.conditioning(batch.frozen())
    tokens = batch.tokens

    def mean(values: torch.Tensor) -> torch.Tensor:
        return mean_over_tokens(values, tokens).mean(dim=1)

    values = []
    for part, state in now.items():
        frozen = start[part]
        drift = mean((state - frozen).square()) / mean(frozen.square()).clamp_min(1e-12)
        values.append(options.anchor * drift - mean(state.abs()))
    return mean_over_parts(values)
