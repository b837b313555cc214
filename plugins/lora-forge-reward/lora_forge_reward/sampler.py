"""A sampler of few steps, through which a gradient can go."""

from __future__ import annotations

import torch

from lora_forge.batch import Batch, side_by_side


def sample(batch: Batch, *, steps: int, gradient_steps: int, guidance: float, negative: str) -> torch.Tensor:
    """Latents without noise `(prompts, *latent_shape)`, of each prompt's own noise, by the adapted model.

    DDIM without noise of its own (Song et al., arXiv:2010.02502, eq. 12 with σ = 0): x' = √ᾱ' x_0 + √(1 - ᾱ') ε, where
    x_0 = (x - √(1 - ᾱ) ε) / √ᾱ. Timesteps end at the last of training (`trailing`, Lin et al., arXiv:2305.08891), and
    ε = ε(negative) + guidance · (ε(prompt) - ε(negative)). The gradient goes through the last `gradient_steps` steps.
    """
    alphas = batch.alphas_cumprod
    timesteps = [round(len(alphas) * (steps - step) / steps) - 1 for step in range(steps)]
    outputs = [batch.adapted()]
    if guidance > 1:
        outputs.insert(0, batch.encode(negative, adapted=True))
    text = side_by_side(outputs)
    latents, recorded = batch.randn("latents", *batch.latent_shape), torch.is_grad_enabled()
    for step, timestep in enumerate(timesteps):
        alpha = alphas[timestep]
        after = alphas[timesteps[step + 1]] if step + 1 < steps else torch.ones_like(alpha)
        with torch.set_grad_enabled(recorded and step >= steps - gradient_steps):
            rows = latents.repeat_interleave(len(outputs), dim=0)
            times = torch.full((len(rows),), timestep, device=latents.device)
            noise = batch.predict_noise(rows, times, text, adapted=True)
            first, last = noise[:: len(outputs)], noise[len(outputs) - 1 :: len(outputs)]
            noise = first + guidance * (last - first) if guidance > 1 else first
            clean = (latents - (1 - alpha).sqrt() * noise) / alpha.sqrt()
            latents = after.sqrt() * clean + (1 - after).sqrt() * noise
    return latents
