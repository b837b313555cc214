"""Several predictions for each prompt in one call of the denoiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lora_forge.batch import Batch, side_by_side
from lora_forge.contracts import EncoderOutput

Text = Mapping[str, EncoderOutput]  # what each encoder makes of one text per prompt


def predict(
    batch: Batch, latents: torch.Tensor, timesteps: torch.Tensor, texts: Sequence[Text], *, adapted: bool
) -> torch.Tensor:
    """Noise predicted for the same latents under each of several texts, `(texts, prompts, *latent_shape)`.

    Those of one prompt are side by side, so that each goes through its own LoRA. The frozen model's are without graph.
    """
    count = len(texts)
    noise = batch.predict_noise(
        latents.repeat_interleave(count, dim=0),
        timesteps.repeat_interleave(count, dim=0),
        side_by_side(texts),
        adapted=adapted,
    )
    return noise.unflatten(0, (batch.prompts, count)).transpose(0, 1)  # type: ignore[no-untyped-call, no-any-return]


def guided(away_from: torch.Tensor, towards: torch.Tensor, guidance: float) -> torch.Tensor:
    """away_from + guidance · (towards - away_from), which at the guidance 1 is `towards` to the bit.

    Source: Ho & Salimans, Classifier-Free Diffusion Guidance (arXiv:2207.12598).
    """
    return torch.lerp(away_from, towards, guidance)


def mean_square(difference: torch.Tensor) -> torch.Tensor:
    """Of each prompt, `(prompts,)`, over all of a latent `(prompts, …)`."""
    return difference.square().flatten(1).mean(dim=1)
