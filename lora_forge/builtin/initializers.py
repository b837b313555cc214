"""Built-in initializers. All start with B = zeros `(out, rank)`, so that the LoRA starts as no change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_forge import InitializerSpec, hookimpl

if TYPE_CHECKING:
    import torch

    from lora_forge.contracts import InitialLayer

_NEGLIGIBLE = 1e-5  # a singular value that small beside the largest is float32's rounding


@dataclass(frozen=True)
class GaussianOptions:
    """Options of `gaussian`."""

    std: float = field(default=0.01, metadata={"help": "standard deviation of A", "above": 0})


@dataclass(frozen=True)
class GainOptions:
    """Options of `orthogonal` and `gradient`. The default is about as long as rows of `gaussian` in SDXL's encoders."""

    gain: float = field(default=0.3, metadata={"help": "length of each row of A", "above": 0})


def gaussian(layer: InitialLayer, options: GaussianOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """A = randn · std, `(rank, in)`. Source: Hu et al., LoRA (arXiv:2106.09685)."""
    import torch

    lora_a = torch.randn(layer.rank, layer.in_features, generator=layer.generator) * options.std
    return lora_a, _zeros(layer)


def kaiming(layer: InitialLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """A uniform between -1/√in and 1/√in, `(rank, in)`: Kaiming's for a = √5, which PEFT starts with.

    Source: He et al., Delving Deep into Rectifiers (arXiv:1502.01852); PEFT, `LoraLayer.reset_lora_parameters`.
    """
    import torch

    lora_a = torch.empty(layer.rank, layer.in_features)
    torch.nn.init.kaiming_uniform_(lora_a, a=5**0.5, generator=layer.generator)
    return lora_a, _zeros(layer)


def orthogonal(layer: InitialLayer, options: GainOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """A `(rank, in)` with random rows of length gain, at right angles to each other; columns where rank > in.

    Source: Saxe et al., Exact solutions to the nonlinear dynamics of learning (arXiv:1312.6120).
    """
    import torch

    lora_a = torch.empty(layer.rank, layer.in_features)
    torch.nn.init.orthogonal_(lora_a, gain=options.gain, generator=layer.generator)
    return lora_a, _zeros(layer)


def gradient(layer: InitialLayer, options: GainOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """A = gain · the first `rank` right singular vectors of the objective's first gradient, `(rank, in)`.

    Where the gradient has fewer, or there is none, the other rows are random directions of the same length.
    Source: Wang et al., LoRA-GA (arXiv:2407.05000), without its B and its change of the frozen weight.
    """
    import torch

    lora_a = torch.randn(layer.rank, layer.in_features, generator=layer.generator)
    lora_a /= lora_a.norm(dim=1, keepdim=True)
    if layer.gradient is not None:
        _, sigma, directions = layer.gradient.svd()
        known = directions[sigma > _NEGLIGIBLE * sigma[0]][: layer.rank]
        lora_a[: len(known)] = known
    return lora_a * options.gain, _zeros(layer)


def _zeros(layer: InitialLayer) -> torch.Tensor:
    import torch

    return torch.zeros(layer.out_features, layer.rank)


@hookimpl
def lora_forge_initializers() -> Iterator[InitializerSpec]:
    yield InitializerSpec(
        name="gaussian",
        summary="A from a normal distribution, B zero: the LoRA starts as no change",
        options=GaussianOptions,
        factory=gaussian,
    )
    yield InitializerSpec(name="kaiming", summary="A from a uniform distribution, as PEFT starts", factory=kaiming)
    yield InitializerSpec(
        name="orthogonal",
        summary="A with random rows at right angles to each other",
        options=GainOptions,
        factory=orthogonal,
    )
    yield InitializerSpec(
        name="gradient",
        summary="A along the directions in which the objective's first gradient is largest",
        options=GainOptions,
        factory=gradient,
        gradient=True,
    )
