"""The loss itself. What is heavy is imported here, not in the package's `__init__`."""

from __future__ import annotations

import torch
from lora_forge.batch import Batch

from lora_forge_example_loss import Options


def lean(batch: Batch, options: Options) -> torch.Tensor:
    """How far the conditioning is from that of `options.towards`, as a share of the whole way; `(prompts,)`.

    It starts at 1. Where `keep` is 0 it ends at 0, at the other text; else the best place is `1 / (1 + keep)` of
    the way. Source: ours.
    """
    now = batch.conditioning(batch.adapted())  # by name, each (prompts, …), with the LoRA
    start = batch.conditioning(batch.frozen())  # the same without it
    goal = batch.conditioning(batch.encode(options.towards, adapted=False))
    shares = []
    for part, state in now.items():
        way = distance(goal[part], start[part]).clamp_min(1e-12)  # not zero, should the prompt be the text
        pull = distance(state, goal[part]) + options.keep * distance(state, start[part])
        shares.append(pull / way)
    return torch.stack(shares).mean(0)


def distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of each prompt, `(prompts,)`: never a mean over prompts."""
    return (one - other).square().flatten(1).mean(1)
