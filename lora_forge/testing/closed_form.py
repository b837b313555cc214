"""Examining a loss's closed form: what `solve` gives, whose it is, and whether the loss itself finds it better."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lora_forge.bank import Bank
from lora_forge.batch import Batch
from lora_forge.contracts import LayerKey, SolveRequest
from lora_forge.testing.compare import (
    FIRST_SEED,
    GRADIENT_TOLERANCE,
    OTHER_MATES,
    SECOND_SEED,
    TOGETHER,
    VALUE_TOLERANCE,
    not_finite,
    relative,
    same_bits,
)
from lora_forge.testing.examination import Broken, global_seed
from lora_forge.testing.stage import ALPHA, RANK, Stage, personal_bank
from lora_forge.training.solving import misfit


def check_closed_form(stage: Stage, needs: frozenset[str], name: str, make: Callable[[], Callable[..., Any]]) -> None:
    """Raises Broken where a loss declared closed_form is not one."""

    def solved(people: Sequence[int], seed: int) -> torch.Tensor:
        with global_seed(seed):
            return _solved(stage, needs, name, make(), people)

    together = solved(TOGETHER, FIRST_SEED)
    if not same_bits(together, solved(TOGETHER, SECOND_SEED)):
        raise Broken("run twice, under another global seed, its solve() gives other weights for the same prompts")
    if not same_bits(together[0], solved(OTHER_MATES, FIRST_SEED)[0]):
        raise Broken(
            "what solve() gives for prompt 1 of 3 changes when the two beside it are others; solve for each alone"
        )
    for row, person in enumerate(TOGETHER):
        if (share := relative(together[row], solved([person], FIRST_SEED)[0])) > GRADIENT_TOLERANCE:
            raise Broken(
                f"the ΔW that solve() gives for prompt {row + 1} of 3 differs by {share:.2g} of it between beside the "
                "others and alone; solve for each alone"
            )


def _solved(stage: Stage, needs: frozenset[str], name: str, loss: Any, people: Sequence[int]) -> torch.Tensor:
    """Every ΔW of the solution, `(prompts, numbers)`, checked for what must hold every time."""
    if not callable(getattr(loss, "solve", None)):
        raise Broken(
            "declared closed_form, but what its factory gives has no solve(); make it a class with that method"
        )
    bank = personal_bank(stage.layers, people, zero_b=True)
    view = stage.view(people)
    stage.slot.bank = bank
    try:
        with torch.no_grad():
            batch = Batch(view, needs, name)
            view.begin_evaluation()
            before = loss(batch)
            weights = loss.solve(SolveRequest(batch, RANK, ALPHA))
            if wrong := misfit(weights, bank):
                raise Broken(f"its solve() {wrong}")
            if changed := view.changed():
                raise Broken(f"its solve() changes {', '.join(changed)}; compute new tensors")
            deltas = [
                _put(bank, (component, layer), pair)
                for component in weights
                for layer, pair in weights[component].items()
            ]
            if not deltas:
                raise Broken("its solve() gives weights of no layer")
            view.begin_evaluation()
            after = loss(batch)
    finally:
        stage.slot.bank = None
    for row, (was, now) in enumerate(zip(before.tolist(), after.tolist(), strict=True)):
        if now > was + VALUE_TOLERANCE * abs(was):
            raise Broken(
                f"with what its solve() gives, the value of prompt {row + 1} is {now:.6g}, without it {was:.6g}; "
                "smaller is better, and ΔW is alpha / rank · B @ A"
            )
    return torch.cat(deltas, dim=1)


def _put(bank: Bank, key: LayerKey, pair: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Into the bank; its ΔW `(prompts, out · in)`, float64."""
    for name, target in bank.pairs[key]._asdict().items():
        if how := not_finite(pair[name]):
            raise Broken(f"its solve() gives {'.'.join(key)} whose {name} is {how}")
        target.copy_(pair[name])
    return bank.scale * (pair["lora_B"].double() @ pair["lora_A"].double()).flatten(1)
