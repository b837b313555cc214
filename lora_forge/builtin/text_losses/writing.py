"""Losses that write another meaning into a prompt, and one that keeps the meaning of others."""

from __future__ import annotations

import torch

from lora_forge.batch import Batch
from lora_forge.builtin.text_losses.options import EmbedPreserveOptions, EmbedWriteOptions
from lora_forge.builtin.text_losses.parts import mean_over_parts, mean_square


def embed_write(batch: Batch, options: EmbedWriteOptions) -> torch.Tensor:
    """mean((c(prompt) - c₀(target))²), averaged over the parts of the conditioning; `(prompts,)`.

    c is a part of the conditioning, c₀ that of the frozen model. The mean is over all positions, padding included,
    since the denoiser reads it too. Source: sliders-conceptmod (ntc-ai), `notrigger`.
    """
    now = batch.conditioning(batch.adapted())
    goal = batch.conditioning(batch.encode(options.target, adapted=False))
    return mean_over_parts([mean_square(state - goal[part]) for part, state in now.items()])


def embed_preserve(batch: Batch, options: EmbedPreserveOptions) -> torch.Tensor:
    """mean((c(q) - c₀(q))²), averaged over neutral prompts q and the parts of the conditioning; `(prompts,)`.

    c is a part of the conditioning, c₀ that of the frozen model, at all positions. It is 0 at the start of a run, and
    so is its gradient: it holds what other terms would move. Source: ours; the anchor of concept editing, such as
    Gandikota et al., Unified Concept Editing in Diffusion Models (arXiv:2308.14761), on what the encoders give.
    """
    distances = []
    for neutral in options.neutral:
        now = batch.conditioning(batch.encode(neutral, adapted=True))
        start = batch.conditioning(batch.encode(neutral, adapted=False))
        distances += [mean_square(state - start[part]) for part, state in now.items()]
    return mean_over_parts(distances)
