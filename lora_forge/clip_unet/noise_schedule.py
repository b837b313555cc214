"""The noise schedule a model was trained with, as its scheduler's config has it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lora_forge.clip_unet.pipeline import SCHEDULER
from lora_forge.errors import ModelError

_BETAS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)


def shipped_schedule(configs: Path) -> dict[str, Any]:
    """The scheduler's config in a family's own folder of configs, for a model that has none."""
    config: dict[str, Any] = json.loads((configs / SCHEDULER).read_text(encoding="utf-8"))
    return config


def check_predicts_noise(config: Mapping[str, Any], model: str) -> None:
    """Raises ModelError, naming the model, if its UNet predicts anything but the noise in a latent."""
    predicts = config.get("prediction_type", "epsilon")
    if predicts != "epsilon":
        raise ModelError(
            f"{model}: its UNet predicts {predicts!r}, not the noise ('epsilon'), which is what losses look at that go "
            "through the UNet; choose a loss on the text, or a model that predicts noise"
        )


def alphas_cumprod(config: Mapping[str, Any], model: str) -> torch.Tensor:
    """ᾱ of each training timestep, `(train_timesteps,)` float32 on the CPU.

    A latent x with noise ε at timestep t is √ᾱ_t · x + √(1 - ᾱ_t) · ε (Ho et al., Denoising Diffusion Probabilistic
    Models, arXiv:2006.11239, eq. 4). Raises ModelError for a config without such a schedule.
    """
    from diffusers import DDPMScheduler

    given = {key: config[key] for key in _BETAS if config.get(key) is not None}
    try:
        if not {"beta_schedule", "trained_betas"} & set(given):
            raise ValueError("it has neither beta_schedule nor trained_betas")
        alphas: torch.Tensor = DDPMScheduler(**given).alphas_cumprod
    except Exception as error:  # what diffusers raises for values it does not know, of no common type
        reason = " ".join(str(error).split())
        raise ModelError(f"{model}: its scheduler's config gives no noise schedule: {reason}") from error
    return alphas.float()
