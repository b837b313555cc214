"""Schedules: of the learning rate, options that any optimizer's options may derive from; and of a term's weight."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

TERM_SCHEDULES = ("constant", "linear", "cosine", "linear_up", "cosine_up")
_TERM = re.compile(r"([a-z_]+)(?::(\d{1,9})-(\d{1,9}))?\Z")


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


@dataclass(frozen=True)
class TermSchedule:
    """How a term's weight goes over the steps, as a factor of it.

    Over the steps `first` to `last`, of all steps where they are None: `constant` is 1, `linear` and `cosine` fall
    from 1 towards 0, `linear_up` and `cosine_up` rise to 1. Before and after, `constant` is 0, the others stay at what
    they come from and go to. Source: ours; cosine is Loshchilov & Hutter, SGDR (arXiv:1608.03983), without restarts.
    """

    kind: str = "constant"
    first: int | None = None
    last: int | None = None

    @classmethod
    def read(cls, text: str) -> TermSchedule:
        """From `KIND` or `KIND:FIRST-LAST`, such as `linear:10-40`. Raises ValueError, in words."""
        match = _TERM.match(text)
        if not match or match[1] not in TERM_SCHEDULES:
            kinds = ", ".join(TERM_SCHEDULES)
            raise ValueError(f"expected a schedule such as linear or linear:10-40, of {kinds}; got {text!r}")
        first, last = (int(number) if number else None for number in match.groups()[1:])
        if first is not None and last is not None and not 1 <= first <= last:
            raise ValueError(f"steps count from 1, and the last comes after the first; got {text!r}")
        return cls(match[1], first, last)

    def __str__(self) -> str:
        return self.kind if self.first is None else f"{self.kind}:{self.first}-{self.last}"

    def factor(self, step: int, iterations: int) -> float:
        """The factor at a step, counted from 1, of `iterations`."""
        first, last = self.first or 1, self.last or iterations
        if self.kind == "constant":
            return float(first <= step <= last)
        steps = last - first + 1
        if self.kind.endswith("_up"):
            done = min(max(step - first + 1, 0), steps) / steps
            return done if self.kind == "linear_up" else 0.5 * (1 - math.cos(math.pi * done))
        done = min(max(step - first, 0), steps) / steps
        return 1 - done if self.kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
