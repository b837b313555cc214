"""The loss: minus the reward of a picture that is sampled from each prompt's own noise."""

from __future__ import annotations

import torch

from lora_forge.batch import Batch
from lora_forge.errors import ObjectiveError
from lora_forge_reward.clip import ClipSimilarity
from lora_forge_reward.functions import RewardFunction, find_function
from lora_forge_reward.options import Options
from lora_forge_reward.sampler import sample


class Reward:
    """-reward(decode(x_0), prompt), `(prompts,)`: one picture for each prompt, another at every step.

    x_0 is sampled with the adapted model; its gradient goes through the last `gradient_steps` steps of the sampler.
    Source: Clark et al., Directly Fine-Tuning Diffusion Models on Differentiable Rewards, DRaFT-K (arXiv:2309.17400).
    Raises PluginError or ModelError where the reward cannot be had, ObjectiveError where it is none.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.name = str(options.function) if options.function else "CLIP similarity"
        self.reward: RewardFunction = (
            find_function(options.function)
            if options.function
            else ClipSimilarity(options.clip_folder or options.clip_model)
        )

    def __call__(self, batch: Batch) -> torch.Tensor:
        options = self.options
        latents = sample(
            batch,
            steps=options.steps,
            gradient_steps=options.gradient_steps,
            guidance=options.guidance,
            negative=options.negative,
        )
        pictures = batch.decode(latents)
        reward = self.reward(pictures, next(iter(batch.texts.values())))
        if not isinstance(reward, torch.Tensor) or reward.shape != (batch.prompts,):
            got = f"shape {tuple(reward.shape)}" if isinstance(reward, torch.Tensor) else type(reward).__name__
            raise ObjectiveError(f"reward {self.name} must give one number per picture, ({batch.prompts},); got {got}")
        if pictures.requires_grad and not reward.requires_grad:
            raise ObjectiveError(f"reward {self.name} has no gradient to the pictures, so nothing would be trained")
        return -reward.float()
