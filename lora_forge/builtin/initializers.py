"""Built-in initializers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_forge import InitializerSpec, hookimpl

if TYPE_CHECKING:
    import torch

    from lora_forge.contracts import InitialLayer


@dataclass(frozen=True)
class GaussianOptions:
    """Options of `gaussian`."""

    std: float = field(default=0.01, metadata={"help": "standard deviation of A", "above": 0})


def gaussian(layer: InitialLayer, options: GaussianOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """A = randn · std, `(rank, in)`; B = zeros, `(out, rank)`. Source: Hu et al., LoRA (arXiv:2106.09685)."""
    import torch

    lora_a = torch.randn(layer.rank, layer.in_features, generator=layer.generator) * options.std
    return lora_a, torch.zeros(layer.out_features, layer.rank)


@hookimpl
def lora_forge_initializers() -> Iterator[InitializerSpec]:
    yield InitializerSpec(
        name="gaussian",
        summary="A from a normal distribution, B zero: the LoRA starts as no change",
        options=GaussianOptions,
        factory=gaussian,
    )
