"""A run's optimizers: one over the whole bank, or one per prompt; and what ends their training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lora_forge.bank import Bank
from lora_forge.plugins import accepts


def make_optimizer(make: Callable[..., Any], parameters: list[torch.nn.Parameter], iterations: int) -> Any:
    """What an optimizer's factory makes over these parameters, told how many steps are planned if it asks."""
    return make(parameters, **({"iterations": iterations} if accepts(make, "iterations") else {}))


def start_optimizers(
    make: Callable[..., Any], bank: Bank, *, elementwise: bool, iterations: int
) -> list[torch.optim.Optimizer]:
    """One optimizer over the whole bank if it is elementwise, else one over each prompt's matrices."""
    if elementwise:
        return [make_optimizer(make, [bank.parameter], iterations)]
    return [make_optimizer(make, bank.rows(prompt), iterations) for prompt in range(bank.prompts)]


def end_training(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Schedule-free optimizers train at other weights than those they give: `eval()` puts these in place."""
    for optimizer in optimizers:
        if callable(end := getattr(optimizer, "eval", None)):
            end()
