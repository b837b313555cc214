"""Reward functions as a user writes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

SEEN: list[torch.Tensor] = []  # the pictures that `watched` was given


def brightness(pictures: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    return pictures.mean((1, 2, 3))


def watched(pictures: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    assert len(prompts) == len(pictures)
    SEEN.append(pictures.detach().clone())
    return pictures.mean((1, 2, 3))


class Colour(torch.nn.Module):
    """How red pictures are; a model of its own, made once."""

    made = 0

    def __init__(self) -> None:
        super().__init__()
        Colour.made += 1
        self.register_buffer("red", torch.tensor([1.0, -0.5, -0.5]))

    def forward(self, pictures: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return (pictures.mean((2, 3)) * self.red).sum(1)


class Unmakeable:
    def __init__(self, weights: str) -> None:
        self.weights = weights


def mean_of_all(pictures: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    return pictures.mean()


def counted(pictures: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    return (pictures > 0.5).float().mean((1, 2, 3))


def by_length(pictures: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    return pictures.mean((1, 2, 3)) * torch.tensor([float(len(prompt)) for prompt in prompts])
