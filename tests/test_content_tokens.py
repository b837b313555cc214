"""Losses that read a text's own tokens only: the encoders run no further than the longest text, and nothing changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from lora_forge.batch import Batch
from lora_forge.clock import Clock
from lora_forge.config.run import read_run_config
from lora_forge.model import open_model
from lora_forge.plan import Request, make_plan
from lora_forge.plugins import discover
from lora_forge.training.objective import Objective, Term, backward
from lora_forge.training.train import set_up

PROMPTS = ["a steampunk owl", "bond", "a squirrel in a forest, in the rain"]
Values = tuple[torch.Tensor, torch.Tensor]


def content(batch: Batch) -> torch.Tensor:
    """The mean size of each text's own tokens, how far they moved, and the pooled vectors of another text."""
    total = torch.zeros(batch.prompts)
    adapted, frozen, other = batch.adapted(masked=True), batch.frozen(), batch.encode("blurry", adapted=True)
    for encoder, tokens in batch.tokens.items():
        own = tokens.attention_mask[..., None]
        moved = adapted[encoder].last_hidden_state.abs() + frozen[encoder].penultimate_hidden_state
        total = total - (moved * own).sum(dim=(1, 2)) / own.sum(dim=(1, 2)) / moved.shape[2]
        total = total - adapted[encoder].pooled.square().mean(dim=1) + other[encoder].pooled.abs().mean(dim=1)
    return total


class Lengths:
    """`content`, and how many positions it was given at each call."""

    def __init__(self) -> None:
        self.seen: list[set[int]] = []

    def __call__(self, batch: Batch) -> torch.Tensor:
        outputs = [*batch.adapted().values(), *batch.frozen().values()]
        states = [state for one in outputs for state in (one.last_hidden_state, one.penultimate_hidden_state)]
        self.seen.append({state.shape[1] for state in states})
        self.seen[-1] |= {tokens.input_ids.shape[1] for tokens in batch.tokens.values()}
        return content(batch)


def objectives(
    model: str, prompts: Sequence[str], terms: Sequence[Term]
) -> Iterator[tuple[Objective, Values, torch.Tensor]]:
    """The objective, then its values and gradient in a step, and its values outside of one."""
    registry = discover()
    plan = make_plan(read_run_config([{"prompt": prompts[0], "model": model}]), registry)
    opened = open_model(plan)
    with opened.use(plan, Clock()):
        bank, view, _ = set_up(plan, [Request(prompt, None, i, None) for i, prompt in enumerate(prompts)], opened)
        with torch.no_grad():
            bank.parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
        opened.slot.bank = bank
        objective = Objective(terms, view)
        view.content_only = objective.content_only
        view.begin_step()
        total = objective.total(objective.values())
        backward(total)
        view.begin_evaluation()
        with torch.no_grad():
            outside = objective.total(objective.values())
        yield objective, (total.detach(), bank.gradient.clone()), outside


def term(loss: object, *, content_only: bool, needs: frozenset[str] = frozenset({"text"})) -> Term:
    return Term("it", 1.0, needs, loss, content_only)  # type: ignore[arg-type]


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[1:2], ["owl " * 90]])
def test_a_loss_that_reads_content_only_has_the_value_and_the_gradient_it_has_on_all_tokens(
    model: str, prompts: list[str]
) -> None:
    ((_, (value, gradient), outside),) = objectives(model, prompts, [term(content, content_only=True)])
    ((_, (expected, of_all), _),) = objectives(model, prompts, [term(content, content_only=False)])
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(outside, expected, rtol=1e-6, atol=1e-6)
    assert float(of_all.norm()) > 0
    assert float((gradient - of_all).norm()) <= 1e-5 * float(of_all.norm())


def test_outputs_and_tokens_end_with_the_longest_text_in_a_step_and_are_whole_outside_of_one(model: str) -> None:
    loss = Lengths()
    list(objectives(model, PROMPTS, [term(loss, content_only=True)]))
    assert loss.seen == [{11}, {77}], "the start, nine tokens, and the end"


@pytest.mark.parametrize("needs", [{"text"}, {"text", "noise_prediction"}])
def test_one_loss_that_reads_more_and_a_denoiser_get_all_tokens(model: str, needs: set[str]) -> None:
    loss = Lengths()
    terms = [term(loss, content_only=True), term(content, content_only=len(needs) > 1, needs=frozenset(needs))]
    list(objectives(model, PROMPTS, terms))
    assert loss.seen == [{77}, {77}]
