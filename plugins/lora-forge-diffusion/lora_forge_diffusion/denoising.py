"""The latents a loss looks at: pure noise, or what some steps of denoising have made of it."""

from __future__ import annotations

import torch

from lora_forge.batch import Batch
from lora_forge_diffusion.options import DenoisingOptions
from lora_forge_diffusion.passes import Text, guided, predict


def noisy_latents(batch: Batch, text: Text, options: DenoisingOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents `(prompts, *latent_shape)` and the timesteps `(prompts,)` they are at, drawn for each prompt alone.

    With `options.steps` n > 0 a denoising of n steps is begun, of which 0 to n - 1 are done, all equally likely: DDIM
    without noise (Song et al., arXiv:2010.02502, eq. 12), by the adapted model and with guidance, as ESD, LECO and
    Concept Sliders do it, so that the model is corrected where it is by now. With 0 it is pure noise, at any timestep.

    text: the adapted encoders' outputs; no gradient goes through the denoising.
    """
    latents = batch.randn("latents", *batch.latent_shape)
    share = torch.special.ndtr(batch.randn("timestep"))  # uniform in [0, 1]
    alphas = batch.alphas_cumprod
    if options.steps == 0:
        return latents, _nth(share, len(alphas))
    schedule = ddim_timesteps(len(alphas), options.steps).to(latents.device)
    done = _nth(share, options.steps)
    with torch.no_grad():
        empty = batch.encode("", adapted=True) if options.steps > 1 else text
        for step in range(int(done.max())):
            now, then = schedule[step], schedule[step + 1]
            without, with_text = predict(batch, latents, now.expand(batch.prompts), [empty, text], adapted=True)
            noise = guided(without, with_text, options.denoising_guidance)
            stepped = ddim_step(latents, noise, alphas[now], alphas[then])
            latents = torch.where((step < done).view(-1, 1, 1, 1), stepped, latents)
    return latents, schedule[done]


def _nth(share: torch.Tensor, count: int) -> torch.Tensor:
    """0 to count - 1, int64, from a share in [0, 1]."""
    return (share * count).long().clamp(max=count - 1)


def ddim_timesteps(train_timesteps: int, steps: int) -> torch.Tensor:
    """`(steps,)` int64 from the last timestep on, evenly spaced: "trailing" of Lin et al., arXiv:2305.08891."""
    return (train_timesteps - torch.arange(steps) * (train_timesteps / steps)).round().long().clamp(min=1) - 1


def ddim_step(latents: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor, then: torch.Tensor) -> torch.Tensor:
    """From ᾱ = `alpha` to ᾱ = `then`: the latent without its noise, and the same noise put back at the new share."""
    clean = (latents - (1 - alpha).sqrt() * noise) / alpha.sqrt()
    return then.sqrt() * clean + (1 - then).sqrt() * noise
