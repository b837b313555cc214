"""Losses on what the denoiser predicts for the prompt."""

from __future__ import annotations

import torch

from lora_forge.batch import Batch
from lora_forge_diffusion.denoising import noisy_latents
from lora_forge_diffusion.options import CfgBakeOptions, DenoisingOptions, IlecoOptions
from lora_forge_diffusion.passes import guided, mean_square, predict


def ileco(batch: Batch, options: IlecoOptions) -> torch.Tensor:
    """MSE(ε_θ(z, t, prompt), ε_0(z, t, target)), `(prompts,)`; z is pure noise, t any timestep.

    Source: iLECO of hako-mikan/sd-webui-traintrain, which is LECO (p1atdev/LECO) on pure noise instead of latents.
    """
    own = batch.adapted()
    latents, timesteps = noisy_latents(batch, own, DenoisingOptions(steps=0))
    target = batch.predict_noise(latents, timesteps, batch.encode(options.target, adapted=False), adapted=False)
    return mean_square(batch.predict_noise(latents, timesteps, own, adapted=True) - target)


def cfg_bake(batch: Batch, options: CfgBakeOptions) -> torch.Tensor:
    """MSE(ε_θ(x, t, prompt), ε_0(∅) + g · (ε_0(prompt) - ε_0(∅))), `(prompts,)`, ∅ being `options.negative`.

    Source: guidance is Ho & Salimans, arXiv:2207.12598; a model that predicts what its teacher predicts with guidance,
    stage one of Meng et al., On Distillation of Guided Diffusion Models, arXiv:2210.03142.
    """
    own = batch.adapted()
    latents, timesteps = noisy_latents(batch, own, options)
    texts = [batch.encode(options.negative, adapted=False), batch.frozen()]
    negative, prompt = predict(batch, latents, timesteps, texts, adapted=False)
    target = guided(negative, prompt, options.guidance)
    return mean_square(batch.predict_noise(latents, timesteps, own, adapted=True) - target)
