"""Unified Concept Editing by its normal equations, in float64, on a pipeline of diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class ByHand:
    """What the method comes to for one prompt.

    pipe: a diffusers pipeline of the base model. source, target: the texts; preserve: those to keep.
    """

    pipe: Any
    source: str
    target: str
    preserve: Sequence[str]
    preserve_weight: float
    ridge: float
    _known: dict[str, torch.Tensor] = field(default_factory=dict)

    def states(self, text: str) -> torch.Tensor:
        """What cross-attention reads, `(length, width)`, as the pipeline itself encodes it."""
        if text not in self._known:
            settings = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
            with torch.no_grad():
                self._known[text] = self.pipe.encode_prompt(text, **settings)[0][0].double()
        return self._known[text]

    def layers(self) -> dict[str, torch.Tensor]:
        """The frozen weights of the cross-attention's keys and values."""
        return {
            name: module.weight.detach().double()
            for name, module in self.pipe.unet.named_modules()
            if "attn2" in name and name.rsplit(".", 1)[-1] in ("to_k", "to_v")
        }

    def gram(self) -> torch.Tensor:
        """Sum of weight · c cᵀ over all texts' tokens, and the ridge."""
        source = self.states(self.source)
        gram = self.ridge * torch.eye(source.shape[1], dtype=torch.float64)
        for state in source:
            gram += torch.outer(state, state) / len(source)
        for text in self.preserve:
            kept = self.states(text)
            for state in kept:
                gram += self.preserve_weight * torch.outer(state, state) / (len(kept) * len(self.preserve))
        return gram

    def best(self, weight: torch.Tensor) -> torch.Tensor:
        """The W of the closed form, of whatever rank its change is."""
        source, target = self.states(self.source), self.states(self.target)
        right = self.ridge * weight
        for state, wanted in zip(source, target, strict=True):
            right = right + torch.outer(weight @ wanted, state) / len(source)
        for text in self.preserve:
            kept = self.states(text)
            for state in kept:
                share = self.preserve_weight / (len(kept) * len(self.preserve))
                right = right + share * torch.outer(weight @ state, state)
        return right @ torch.linalg.inv(self.gram())

    def value(self, weight: torch.Tensor, delta: torch.Tensor) -> float:
        """The objective of one layer."""
        source, target = self.states(self.source), self.states(self.target)
        edit = sum(
            float(((weight + delta) @ state - weight @ wanted).square().sum())
            for state, wanted in zip(source, target, strict=True)
        ) / len(source)
        kept = [float((delta @ state).square().sum()) for text in self.preserve for state in self.states(text)]
        total = edit + self.preserve_weight * sum(kept) / len(kept) + self.ridge * float(delta.square().sum())
        return total / len(weight)

    def truncated(self, delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, float]:
        """The nearest change of a rank in the metric of the objective, by the symmetric root, and what that loses."""
        values, vectors = torch.linalg.eigh(self.gram())
        root = vectors * values.sqrt() @ vectors.T
        u, s, vh = torch.linalg.svd(delta @ root, full_matrices=False)
        return u[:, :rank] * s[:rank] @ vh[:rank] @ torch.linalg.inv(root), float(s[rank:].square().sum()) / len(delta)
