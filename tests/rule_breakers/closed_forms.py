"""Losses with a closed form that each break the rule about it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lora_forge.batch import Batch
from lora_forge.contracts import LoraWeights, SolveRequest, TargetLayer
from rule_breakers import Breaker, losses


class Good:
    """A closed form that breaks no rule: weights that are less by a hundredth for each token of the prompt."""

    def __call__(self, batch: Batch) -> torch.Tensor:
        shares, total = self._shares(batch), torch.zeros(batch.prompts)
        for layer in self._layers(batch):
            left, right = batch.low_rank(layer)
            total = total + (shares * batch.weight(layer) + left @ right).square().sum((1, 2))
        return total

    def solve(self, request: SolveRequest) -> LoraWeights:
        shares = self._shares(request.batch) * request.rank / request.alpha
        result: LoraWeights = {}
        for layer in self._layers(request.batch):
            u, s, vh = torch.linalg.svd(request.batch.weight(layer))
            lora_a = vh[: request.rank].expand(len(shares), -1, -1)
            lora_b = -shares * u[:, : request.rank] * s[: request.rank]
            result.setdefault(layer.component, {})[layer.name] = {"lora_A": lora_a, "lora_B": lora_b}
        return result

    def _shares(self, batch: Batch) -> torch.Tensor:
        return batch.tokens["text_encoder"].attention_mask.sum(1)[:, None, None] / 100

    def _layers(self, batch: Batch) -> list[TargetLayer]:
        return [layer for layer in batch.layers if layer.component in batch.encoders]


class Changed(Good):
    """The same with other matrices."""

    def change(self, name: str, matrix: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def solve(self, request: SolveRequest) -> LoraWeights:
        return {
            component: {
                layer: {name: self.change(name, matrix) for name, matrix in pair.items()}
                for layer, pair in layers.items()
            }
            for component, layers in super().solve(request).items()
        }


class TooWide(Changed):
    def change(self, name: str, matrix: torch.Tensor) -> torch.Tensor:
        return torch.cat([matrix, matrix], dim=2)


class Infinite(Changed):
    def change(self, name: str, matrix: torch.Tensor) -> torch.Tensor:
        return matrix / 0


class ByChance(Changed):
    def change(self, name: str, matrix: torch.Tensor) -> torch.Tensor:
        return matrix * torch.rand(())


class ForAllAtOnce(Changed):
    def change(self, name: str, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.mean(0).expand_as(matrix)


class TheOpposite(Changed):
    def change(self, name: str, matrix: torch.Tensor) -> torch.Tensor:
        return -matrix if name == "lora_B" else matrix


class NoLayer(Good):
    def solve(self, request: SolveRequest) -> LoraWeights:
        return {"decoder": next(iter(super().solve(request).values()))}


class Nothing(Good):
    def solve(self, request: SolveRequest) -> LoraWeights:
        return {}


class Overwrites(Good):
    def solve(self, request: SolveRequest) -> LoraWeights:
        for output in request.batch.frozen().values():
            output.pooled.zero_()
        return super().solve(request)


def breaker(what: str, factory: Callable[..., object], *words: str) -> Breaker:
    return Breaker(what, losses.spec(factory, closed_form=True), "solves", words)


BREAKERS = [
    breaker("has no solve", losses.good, "no solve()", "class"),
    breaker("solves for another shape", TooWide, "lora_A is of shape", "expected"),
    breaker("solves for a layer there is not", NoLayer, "decoder.", "no target layer"),
    breaker("solves for no layer", Nothing, "of no layer"),
    breaker("solves for infinity", Infinite, "lora_A is"),
    breaker("changes what it is given to solve with", Overwrites, "the frozen pooled of text_encoder", "new tensors"),
    breaker("solves by chance", ByChance, "another global seed"),
    breaker("solves for all prompts at once", ForAllAtOnce, "prompt 1 of 3", "each alone"),
    breaker("solves for the opposite", TheOpposite, "smaller is better", "alpha / rank"),
]
