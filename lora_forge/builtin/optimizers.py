"""Built-in optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_forge import OptimizerSpec, hookimpl
from lora_forge.schedules import ScheduleOptions, scheduled

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class AdamWOptions(ScheduleOptions):
    """Options of `adamw`: torch's, with torch's defaults but for `lr`."""

    lr: float = field(default=1e-4, metadata={"help": "learning rate", "above": 0})
    betas: tuple[float, float] = field(
        default=(0.9, 0.999), metadata={"help": "decay of the two running means", "min": 0, "max": 0.999999}
    )
    eps: float = field(default=1e-8, metadata={"help": "added to the denominator", "min": 0})
    weight_decay: float = field(default=0.01, metadata={"help": "decoupled weight decay", "min": 0})


def adamw(parameters: Iterable[torch.nn.Parameter], options: AdamWOptions, iterations: int) -> torch.optim.Optimizer:
    """Loshchilov & Hutter, Decoupled Weight Decay Regularization (arXiv:1711.05101), as torch has it.

    foreach, not fused: the fused kernel's rounding depends on where in its tensor a number lies, so that a
    prompt's values would depend on its batch.
    """
    import torch

    optimizer = torch.optim.AdamW(
        parameters,
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
        foreach=True,
    )
    return scheduled(optimizer, options, iterations)


@hookimpl
def lora_forge_optimizers() -> Iterator[OptimizerSpec]:
    yield OptimizerSpec(
        name="adamw",
        summary="torch's AdamW",
        options=AdamWOptions,
        factory=adamw,
        elementwise=True,
    )
