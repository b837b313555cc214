"""Optimizers that each break one rule."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import nn

from lora_forge import OptimizerSpec
from rule_breakers import Breaker


class Descent(torch.optim.Optimizer):
    """Plain descent, which breaks no rule; the others change `move`."""

    def __init__(self, parameters: Iterable[nn.Parameter], **_: Any) -> None:
        super().__init__(parameters, {"lr": 0.01})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.move(parameter, parameter.grad)

    def move(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        parameter.sub_(0.01 * gradient)


class FirstOnly(Descent):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            first = self.param_groups[0]["params"][0]
            self.move(first, first.grad)


class Replaces(Descent):
    def move(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        parameter.data = parameter.data - 0.01 * gradient


class Explodes(Descent):
    def move(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        parameter.mul_(torch.inf)


class UnitStep(Descent):
    def move(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        parameter.sub_(0.01 * gradient / gradient.norm())


class Noisy(Descent):
    def move(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        parameter.sub_(0.01 * gradient + 0.001 * torch.randn_like(gradient))


_calls = itertools.count()


class Counts(Descent):
    def move(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        parameter.sub_(0.01 / (1 + next(_calls)) * gradient)


class HalvesAllGradients(Descent):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        gradient = self.param_groups[0]["params"][0].grad
        (gradient if gradient._base is None else gradient._base).mul_(0.5)


class Shared(Descent):
    """Counts steps in the class, from the latest instance on."""

    steps: ClassVar[int] = 0

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters)
        Shared.steps = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        Shared.steps += 1
        super().step(closure)

    def move(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        parameter.sub_(0.01 / Shared.steps * gradient)


class RowClipping(Descent):
    """Clips each row of whatever tensor it is given: of the whole bank, each prompt's own."""

    def move(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        parameter.sub_(0.01 * gradient / (gradient.norm(dim=-1, keepdim=True) + 1))


class GlobalClipping(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 0.1)
        super().step()


def clipping(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return GlobalClipping(parameters, lr=0.1)


def adafactor(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(parameters)


def fused(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, fused=True)


def nothing(parameters: Iterable[nn.Parameter]) -> None:
    return None


class Raises(Descent):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise ValueError("a closure is needed")


def make(kind: type[Descent]) -> Callable[..., torch.optim.Optimizer]:
    """A factory that is a function: a class would be made with the options."""

    def factory(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return kind(parameters)

    return factory


def spec(factory: Callable[..., Any], **settings: Any) -> OptimizerSpec:
    made = make(factory) if isinstance(factory, type) else factory
    return OptimizerSpec(name="breaker", summary="breaks a rule", factory=made, **settings)


def breaker(what: str, factory: Callable[..., Any], rule: str, *words: str, **settings: Any) -> Breaker:
    return Breaker(what, spec(factory, **settings), rule, words)


BREAKERS = [
    breaker("is no optimizer", nothing, "optimizer", "NoneType", "torch.optim.Optimizer"),
    breaker("moves the first matrix only", FirstOnly, "moves", "lora_B of text_encoder.", "where it was"),
    breaker("puts a new tensor in place", Replaces, "in_place", "parameter.data = …", "copy_", elementwise=True),
    breaker("puts new tensors in the matrices' place", Replaces, "in_place", "the model never sees"),
    breaker("explodes", Explodes, "finite", "8 steps", "infinite", elementwise=True),
    breaker("divides by the norm of a zero gradient", UnitStep, "zero_gradient", "gradient of zero", "NaN"),
    breaker("draws random numbers", Noisy, "deterministic", "torch.manual_seed", elementwise=True),
    breaker("counts over all runs", Counts, "deterministic", "run twice", "in the instance"),
    breaker("changes every prompt's gradient", HalvesAllGradients, "neighbours", "another prompt's gradients"),
    breaker("counts in its class", Shared, "independent", "prompt 1 of 3", "only in the instance"),
    breaker(
        "clips by the norm of all and says elementwise",
        clipping,
        "independent",
        "than alone",
        "elementwise=False",
        elementwise=True,
    ),
    breaker("is Adafactor and says elementwise", adafactor, "independent", "elementwise=False", elementwise=True),
    breaker("is fused and says elementwise", fused, "independent", "rounding", "foreach", elementwise=True),
    breaker(
        "clips rows and says elementwise",
        RowClipping,
        "elementwise",
        "one flat tensor",
        "separate matrices",
        "elementwise=False",
        elementwise=True,
    ),
    breaker("raises", Raises, "runs", "ValueError: a closure is needed", "optimizers.py, line"),
]
