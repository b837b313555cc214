"""Losses that move a concept: along a direction, both ways, or out of the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lora_forge.batch import Batch
from lora_forge_diffusion.denoising import noisy_latents
from lora_forge_diffusion.options import ConceptEraseOptions, ConceptOptions, ConceptSliderOptions
from lora_forge_diffusion.passes import mean_square, predict


def concept_slider(batch: Batch, options: ConceptSliderOptions) -> torch.Tensor:
    """Mean over s = ±1 of MSE(ε_sθ(x, t, target), ε_0(x, t, target) + s · g · d), `(prompts,)`.

    d is ε_0(x, t, positive) - ε_0(x, t, negative), the mean over attributes; at s = -1 the LoRA's ΔW, of the denoiser
    and of the text encoders, counts negatively (`Batch.negated`). x is the same for both.

    Source: Gandikota et al., Concept Sliders, arXiv:2311.12092, eq. 8 (where attributes are summed up, and s is 1);
    s = -1 and anchors as in ostris/ai-toolkit.
    """
    target = batch.encode(options.target, adapted=True)
    latents, timesteps = noisy_latents(batch, target, options)
    anchors = _anchors(options)
    texts = [options.target, *anchors, *_each(options.positive, options), *_each(options.negative, options)]
    frozen = _predict(batch, latents, timesteps, texts, adapted=False)
    kept = 1 + len(anchors)
    positive, negative = frozen[kept:].chunk(2)
    direction = options.guidance * (positive - negative).mean(dim=0)

    adapted = _predict(batch, latents, timesteps, texts[:kept], adapted=True)
    value = mean_square(adapted[0] - frozen[0] - direction)
    if options.polarity == "both":
        with batch.negated():
            opposite = _predict(batch, latents, timesteps, [options.target], adapted=True)[0]
        value = (value + mean_square(opposite - frozen[0] + direction)) / 2
    return value + _change_of(adapted[1:], frozen[1:kept], options)


def concept_erase(batch: Batch, options: ConceptEraseOptions) -> torch.Tensor:
    """MSE(ε_θ(x, t, concept), ε_0(x, t, neutral) ∓ g · (ε_0(x, t, concept) - ε_0(x, t, neutral))), `(prompts,)`.

    Minus erases, plus enhances. Source: Gandikota et al., Erasing Concepts from Diffusion Models (ESD),
    arXiv:2303.07345, eq. 7; as a LoRA, and both actions, p1atdev/LECO; anchors as in ostris/ai-toolkit.
    """
    concept = batch.encode(options.concept, adapted=True)
    latents, timesteps = noisy_latents(batch, concept, options)
    texts = [options.concept, *_anchors(options), options.neutral]
    frozen = _predict(batch, latents, timesteps, texts, adapted=False)
    adapted = _predict(batch, latents, timesteps, texts[:-1], adapted=True)
    far = options.guidance * (frozen[0] - frozen[-1])
    goal = frozen[-1] + (far if options.action == "enhance" else -far)
    return mean_square(adapted[0] - goal) + _change_of(adapted[1:], frozen[1:-1], options)


def _anchors(options: ConceptOptions) -> tuple[str, ...]:
    return options.anchors if options.anchor_weight else ()


def _each(text: str, options: ConceptSliderOptions) -> list[str]:
    return [f"{text}, {attribute}" if attribute else text for attribute in options.attributes]


def _predict(
    batch: Batch, latents: torch.Tensor, timesteps: torch.Tensor, texts: Sequence[str], *, adapted: bool
) -> torch.Tensor:
    """`(texts, prompts, *latent_shape)`."""
    outputs = [batch.encode(text, adapted=adapted) for text in texts]
    return predict(batch, latents, timesteps, outputs, adapted=adapted)


def _change_of(adapted: torch.Tensor, frozen: torch.Tensor, options: ConceptOptions) -> torch.Tensor | float:
    """The anchors' term, `(prompts,)`, from predictions `(anchors, prompts, …)`."""
    if not len(adapted):
        return 0.0
    return options.anchor_weight * torch.stack([mean_square(change) for change in adapted - frozen]).mean(dim=0)
