"""Watches the optimizers of a run from outside, through the hooks that torch has for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lora_forge import RunResult


@dataclass
class Watched:
    """One optimizer of a run: its parameters before the first step and after the last, and each step's gradients."""

    optimizer: torch.optim.Optimizer
    start: list[torch.Tensor]
    gradients: list[list[torch.Tensor]] = field(default_factory=list)
    last: list[torch.Tensor] = field(default_factory=list)

    def replay(self, make: Callable[[list[nn.Parameter]], Any], schedule: Callable[[Any], Any] | None = None) -> Any:
        """A plain loop with another optimizer over the same parameters and gradients; `(numbers,)` afterwards."""
        parameters = [nn.Parameter(tensor.clone()) for tensor in self.start]
        optimizer = make(parameters)
        scheduler = schedule(optimizer) if schedule else None
        if hasattr(optimizer, "train"):
            optimizer.train()
        for gradients in self.gradients:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
            if scheduler:
                scheduler.step()
        if hasattr(optimizer, "eval"):
            optimizer.eval()
        return flat(parameters)


@contextmanager
def watched() -> Iterator[list[Watched]]:
    """Within this, every optimizer that steps is in the list."""
    seen: list[Watched] = []

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = _parameters(optimizer)
        if not any(one.optimizer is optimizer for one in seen):
            seen.append(Watched(optimizer, [parameter.detach().clone() for parameter in parameters]))
        _find(seen, optimizer).gradients.append([_gradient(parameter).clone() for parameter in parameters])

    def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        _find(seen, optimizer).last = [parameter.detach().clone() for parameter in _parameters(optimizer)]

    handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def steppers(seen: list[Watched], steps: int) -> list[Watched]:
    """Those that took so many steps: `adamw8bit` takes one more, on numbers of no meaning, to see whether it can."""
    return [one for one in seen if len(one.gradients) == steps]


def flat(tensors: list[nn.Parameter] | list[torch.Tensor]) -> torch.Tensor:
    """All numbers of some tensors, `(numbers,)`."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def flat_weights(result: RunResult) -> torch.Tensor:
    """All numbers of a LoRA, in the order an optimizer is given them, `(numbers,)`."""
    return flat([tensor for layers in result.weights.values() for pair in layers.values() for tensor in pair.values()])


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """How far two tensors are apart, in relation to the second."""
    return float((one - other).norm() / other.norm())


def _find(seen: list[Watched], optimizer: torch.optim.Optimizer) -> Watched:
    return next(one for one in seen if one.optimizer is optimizer)


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad
