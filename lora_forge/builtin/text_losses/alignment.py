"""Losses that turn a prompt's vectors towards some texts and away from others."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn.functional import cosine_similarity

from lora_forge.batch import Batch
from lora_forge.builtin.text_losses.options import PooledAlignOptions, PromptContrastOptions
from lora_forge.builtin.text_losses.parts import mean_over_parts, state_at_end
from lora_forge.contracts import EncoderOutput


def pooled_align(batch: Batch, options: PooledAlignOptions) -> torch.Tensor:
    """1 - cos(pooled(prompt), pooled₀(target)); `(prompts,)`.

    pooled is what the denoiser is given as one vector for the whole text, pooled₀ that of the frozen model; in a family
    without such a part, the pooled output of each encoder, averaged over encoders. Source: ours, with CLIP's measure of
    likeness (Radford et al., arXiv:2103.00020).
    """
    now = _pooled(batch, batch.adapted())
    goal = _pooled(batch, batch.encode(options.target, adapted=False))
    return mean_over_parts([1 - cosine_similarity(vector, goal[name], dim=1) for name, vector in now.items()])


def prompt_contrast(batch: Batch, options: PromptContrastOptions) -> torch.Tensor:
    """-log(exp(s⁺/τ) / (exp(s⁺/τ) + Σ exp(s⁻/τ))), τ the temperature; `(prompts,)`.

    s is the cosine of the prompt's adapted conditioning to the frozen one of another text, averaged over the parts of
    the conditioning, each at the text's last token: s⁺ to the target, s⁻ to each of the negatives. By default the
    target is the prompt itself.

    Source: InfoNCE, van den Oord et al., Representation Learning with Contrastive Predictive Coding (arXiv:1807.03748).
    """
    now = _at_end(batch, "{prompt}", adapted=True)
    others = [_at_end(batch, text, adapted=False) for text in (options.target, *options.negative)]
    likeness = [
        mean_over_parts([cosine_similarity(vector, other[part], dim=1) for part, vector in now.items()])
        for other in others
    ]
    logits = torch.stack(likeness) / options.temperature  # (1 + negatives, prompts)
    return logits.logsumexp(dim=0) - logits[0]


def _pooled(batch: Batch, outputs: Mapping[str, EncoderOutput]) -> dict[str, torch.Tensor]:
    parts = {name: part for name, part in batch.conditioning(outputs).items() if part.ndim == 2}
    return parts or {encoder: output.pooled for encoder, output in outputs.items()}


def _at_end(batch: Batch, text: str, *, adapted: bool) -> dict[str, torch.Tensor]:
    tokens = batch.tokenize(text)
    parts = batch.conditioning(batch.encode(text, adapted=adapted))
    return {name: state_at_end(part, tokens) for name, part in parts.items()}
