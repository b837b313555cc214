"""Built-in optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_forge import OptimizerSpec, hookimpl
from lora_forge.schedules import ScheduleOptions, scheduled

if TYPE_CHECKING:
    import torch


_VECTOR = 16  # numbers; no processor's vectors hold more, nor a number of them that does not divide it


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
    """Loshchilov & Hutter, Decoupled Weight Decay Regularization (arXiv:1711.05101), as torch has it, fused."""
    import torch

    parameters = list(parameters)
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    whole = [_Whole(parameter) for parameter in parameters if parameter.device.type == "cpu"]
    optimizer = torch.optim.AdamW(
        [part for own in whole for part in own.parts] or parameters,
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
        fused=fused or None,
    )
    for own in whole:
        own.bring()
        optimizer.register_step_pre_hook(lambda *_, own=own: own.bring())
        optimizer.register_step_post_hook(lambda *_, own=own: own.take_back())
    return scheduled(optimizer, options, iterations)


class _Whole:
    """A parameter of the CPU as one or two that are whole vectors long.

    The fused kernel steps the last numbers of a tensor, which fill no vector, one by one, and may round them otherwise:
    a number's value would depend on where in its tensor it lies, and a prompt's on its batch. So these have a place of
    their own, with zeros behind them.
    """

    def __init__(self, parameter: torch.nn.Parameter) -> None:
        import torch

        self._parameter = parameter
        self._even = parameter.numel() // _VECTOR * _VECTOR if parameter.is_contiguous() else 0
        rest = parameter.numel() - self._even
        self._main = torch.nn.Parameter(parameter.detach().view(-1)[: self._even]) if self._even else None
        self._rest = torch.nn.Parameter(parameter.new_zeros(-(-rest // _VECTOR) * _VECTOR)) if rest else None
        self.parts = [part for part in (self._main, self._rest) if part is not None]

    def bring(self) -> None:
        """Before a step: the parameter's numbers, and its gradient's, to where they are stepped."""
        import torch

        gradient = self._parameter.grad
        if self._main is not None:
            self._main.grad = None if gradient is None else gradient.reshape(-1)[: self._even]
        if self._rest is not None:
            with torch.no_grad():
                self._rest[: self._count].copy_(self._parameter.detach().reshape(-1)[self._even :])
                self._rest.grad = None
                if gradient is not None:
                    self._rest.grad = torch.zeros_like(self._rest)
                    self._rest.grad[: self._count] = gradient.reshape(-1)[self._even :]

    def take_back(self) -> None:
        """After a step: what was not stepped in place."""
        import torch

        if self._rest is not None:
            shape = self._parameter.shape
            with torch.no_grad():
                if self._even:
                    self._parameter.detach().view(-1)[self._even :].copy_(self._rest[: self._count])
                else:
                    self._parameter.copy_(self._rest[: self._count].view(shape))

    @property
    def _count(self) -> int:
        return self._parameter.numel() - self._even


@hookimpl
def lora_forge_optimizers() -> Iterator[OptimizerSpec]:
    yield OptimizerSpec(
        name="adamw",
        summary="torch's AdamW",
        options=AdamWOptions,
        factory=adamw,
        elementwise=True,
    )
