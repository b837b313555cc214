"""Built-in optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_forge import OptimizerSpec, hookimpl
from lora_forge.schedules import ScheduleOptions, scheduled

if TYPE_CHECKING:
    import torch


_PIECE = 2**17  # numbers; with their gradient, two moments and a denominator, 2.5 MB


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

    On CUDA fused. On a CPU not, since that kernel's rounding depends on where in its tensor a number lies, so that a
    prompt's values would depend on its batch; there the steps go through the numbers piece by piece, each of a size
    that stays in the caches.
    """
    import torch

    parameters = list(parameters)
    on_cpu = all(parameter.device.type == "cpu" for parameter in parameters)
    on_cuda = all(parameter.is_cuda for parameter in parameters)
    pieces = [_pieces(parameter) for parameter in parameters] if on_cpu else []
    optimizer = torch.optim.AdamW(
        [piece for own in pieces for piece in own] or parameters,
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
        foreach=False if on_cpu else None,
        fused=True if on_cuda else None,
    )

    def pass_gradients(*_: object) -> None:
        for parameter, own in zip(parameters, pieces, strict=False):
            gradients = [None] * len(own) if parameter.grad is None else _cut(parameter.grad)
            for piece, gradient in zip(own, gradients, strict=True):
                piece.grad = gradient

    pass_gradients()
    optimizer.register_step_pre_hook(pass_gradients)
    return scheduled(optimizer, options, iterations)


def _pieces(parameter: torch.nn.Parameter) -> list[torch.nn.Parameter]:
    """A parameter's numbers in order, as parameters that are views of it."""
    import torch

    return [torch.nn.Parameter(piece) for piece in _cut(parameter.detach())]


def _cut(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """Views of a tensor's numbers in order; of one that is not in order, itself."""
    import torch

    return torch.split(tensor.view(-1), _PIECE) if tensor.is_contiguous() else [tensor]


@hookimpl
def lora_forge_optimizers() -> Iterator[OptimizerSpec]:
    yield OptimizerSpec(
        name="adamw",
        summary="torch's AdamW",
        options=AdamWOptions,
        factory=adamw,
        elementwise=True,
    )
