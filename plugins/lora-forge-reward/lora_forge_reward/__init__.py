"""A reward model as a loss for lora-forge: pictures are sampled in a few steps, decoded, and rewarded."""

from __future__ import annotations

from collections.abc import Iterator

__lora_forge_api__ = 1

from lora_forge import LossSpec, hookimpl
from lora_forge_reward.options import Options


@hookimpl
def lora_forge_losses() -> Iterator[LossSpec]:
    yield LossSpec(
        name="reward",
        summary="pictures that a reward model likes: CLIP similarity to the prompt, or any function of pictures",
        options=Options,
        needs={"text", "noise_prediction", "vae"},
        formula="-reward(decode(x_0), prompt), x_0 by DDIM from noise, its gradient through the last steps alone",
        source="Clark et al., Directly Fine-Tuning Diffusion Models on Differentiable Rewards (arXiv:2309.17400)",
        factory="lora_forge_reward.reward:Reward",
    )
