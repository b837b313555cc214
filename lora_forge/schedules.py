"""Learning-rate schedules: options that any optimizer's options may derive from, and what applies them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """The learning rate over the steps, as a factor of `lr`."""

    schedule: Literal["constant", "linear", "cosine"] = field(
        default="constant", metadata={"help": "of the learning rate after warm-up: stays, or falls to 0"}
    )
    warmup: int = field(default=0, metadata={"help": "steps over which the learning rate rises from 0", "min": 0})

    def factor(self, step: int, iterations: int) -> float:
        """The factor of `lr` at a step, counted from 0, of `iterations`.

        Source: transformers' `get_scheduler`; cosine is Loshchilov & Hutter, SGDR (arXiv:1608.03983),
        without restarts.
        """
        if step < self.warmup:
            return step / self.warmup
        if self.schedule == "constant":
            return 1.0
        falling = max(1, iterations - self.warmup)
        if self.schedule == "linear":
            return max(0.0, (iterations - step) / falling)
        return 0.5 * (1 + math.cos(math.pi * min((step - self.warmup) / falling, 1.0)))


def scheduled(optimizer: torch.optim.Optimizer, options: ScheduleOptions, iterations: int) -> torch.optim.Optimizer:
    """The optimizer, its learning rate moved after each of its steps."""
    if options.schedule == "constant" and not options.warmup:
        return optimizer
    from torch.optim.lr_scheduler import LambdaLR

    scheduler = LambdaLR(optimizer, lambda step: options.factor(step, iterations))
    optimizer.register_step_post_hook(lambda *_: scheduler.step())
    return optimizer
