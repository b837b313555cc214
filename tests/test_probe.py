"""What is measured of a LoRA beside its objective: against the model run text by text and prompt by prompt."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lora_forge.bank import Bank
from lora_forge.batch import ModelView
from lora_forge.contracts import LayerKey
from lora_forge.effect.probe import Probe, measure_probe, names_of, random_bank
from lora_forge.testing.stage import PROMPTS, Stage, personal_bank, tiny_stage

PEOPLE = (0, 3)
PARAPHRASES = ("a picture of {prompt}", "{prompt}, seen again")
CONTROLS = ("a bowl of cherries", "three red chairs", "a steampunk owl")  # the last is the first one's own prompt


@pytest.fixture(scope="module")
def stage(model: str) -> Stage:
    return tiny_stage(model)


@pytest.fixture
def bank(stage: Stage) -> Iterator[Bank]:
    bank = stage.slot.bank = personal_bank(stage.layers, PEOPLE)
    with torch.no_grad():
        first, second = list(bank.pairs.values())[:2]
        first.lora_B.zero_()  # a layer without a ΔW, and one of which only one prompt has it
        second.lora_B[0].zero_()
    yield bank
    stage.slot.bank = None


def delta(bank: Bank, prompt: int) -> dict[LayerKey, torch.Tensor]:
    """Each layer's ΔW, `(out, in)` float64."""
    return {
        key: bank.scale * pair.lora_B.detach()[prompt].double() @ pair.lora_A.detach()[prompt].double()
        for key, pair in bank.pairs.items()
    }


def alone(bank: Bank, prompt: int) -> Bank:
    """A bank of one prompt, with that prompt's numbers."""
    made = Bank(list(bank.layers.values()), rank=bank.rank, alpha=bank.alpha, prompts=1)
    with torch.no_grad():
        for key, pair in made.pairs.items():
            for mine, theirs in zip(pair, bank.pairs[key], strict=True):
                mine.copy_(theirs[prompt : prompt + 1])
    return made


def shifts(stage: Stage, bank: Bank, prompt: int, text: str) -> dict[str, float]:
    """How far one prompt's LoRA moves a text: each part of the conditioning, and `all` of it."""
    view = ModelView(stage.backend, stage.slot, {one: [text] for one in stage.view([0]).encoders}, [0], "cpu")
    kept, stage.slot.bank = stage.slot.bank, alone(bank, prompt)
    with torch.no_grad():
        before, after = (
            stage.backend.conditioning(view.outputs(view.texts, adapted=adapted, masked=False))
            for adapted in (False, True)
        )
    stage.slot.bank = kept
    moved = {name: float((after[name] - part).double().norm()) for name, part in before.items()}
    size = {name: float(part.double().norm()) for name, part in before.items()}
    whole = math.hypot(*moved.values()) / math.hypot(*size.values())
    return {"all": whole, **{name: moved[name] / size[name] for name in before}}


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def measured(stage: Stage, bank: Bank, view: ModelView, **settings: Any) -> list[Probe]:
    given: dict[str, Any] = {"paraphrases": PARAPHRASES, "controls": CONTROLS, "evaluate": lambda: [{}, {}]}
    return measure_probe(bank, view, reached=list(bank.pairs), **{**given, **settings})


def test_shifts_are_those_of_each_text_and_prompt_alone(stage: Stage, bank: Bank) -> None:
    random = random_bank(bank, bank.delta_norms(), names_of(stage.view(PEOPLE)))
    for prompt, probe in enumerate(measured(stage, bank, stage.view(PEOPLE))):
        own = PROMPTS[PEOPLE[prompt]]
        for weights, found in ((bank, probe), (random, probe.random)):
            expected = shifts(stage, weights, prompt, own)
            others = [
                [shifts(stage, weights, prompt, text.replace("{prompt}", own))["all"] for text in texts]
                for texts in (PARAPHRASES, [one for one in CONTROLS if one != own], [""])
            ]
            told = found.specificity
            assert found.conditioning_shift == told.own == pytest.approx(expected.pop("all"), rel=1e-4)
            assert found.shifts == pytest.approx(expected, rel=1e-4)
            assert [told.paraphrases, told.controls, told.empty] == pytest.approx(list(map(mean, others)), rel=1e-4)
            assert told.own is not None
            assert told.controls
            assert told.ratio == told.own / told.controls


def test_norms_and_rank_are_those_of_the_products_written_out(stage: Stage, bank: Bank) -> None:
    for prompt, probe in enumerate(measured(stage, bank, stage.view(PEOPLE))):
        products = delta(bank, prompt)
        assert probe.delta_norm == pytest.approx(float(torch.cat([one.flatten() for one in products.values()]).norm()))
        for component, norm in probe.component_norms.items():
            own = [one.flatten() for key, one in products.items() if key[0] == component]
            assert norm == pytest.approx(float(torch.cat(own).norm()))
        ranks = []
        for one in products.values():
            if bool(one.any()):
                share = torch.linalg.svdvals(one)[: bank.rank]
                share = share / share.sum()
                ranks.append(math.exp(-float((share * share.log()).sum())))
        assert len(ranks) == len(products) - (2, 1)[prompt]
        assert probe.effective_rank == pytest.approx(mean(ranks), rel=1e-6)


def test_effective_rank_is_of_the_layers_reached(stage: Stage, bank: Bank) -> None:
    keys = list(bank.pairs)
    some, none = (
        measure_probe(bank, stage.view(PEOPLE), reached, (), (), lambda: [{}, {}]) for reached in (keys[2:4], keys[:1])
    )
    assert some[0].effective_rank != measured(stage, bank, stage.view(PEOPLE))[0].effective_rank
    assert none[0].effective_rank is None


def test_the_random_lora_has_every_layers_norm_and_nothing_else_of_it(stage: Stage, bank: Bank) -> None:
    random = random_bank(bank, bank.delta_norms(), names_of(stage.view(PEOPLE)))
    for prompt in range(len(PEOPLE)):
        ours, theirs = delta(bank, prompt), delta(random, prompt)
        for key, one in ours.items():
            assert float(theirs[key].norm()) == pytest.approx(float(one.norm()), rel=1e-5)
            if bool(one.any()):
                assert abs(float(torch.cosine_similarity(one.flatten(), theirs[key].flatten(), dim=0))) < 0.3


def test_the_random_lora_depends_on_the_prompt_and_its_seed_and_not_on_who_is_beside_it(
    stage: Stage, bank: Bank
) -> None:
    both = random_bank(bank, bank.delta_norms(), names_of(stage.view(PEOPLE)))
    one = alone(bank, 1)
    again = random_bank(one, one.delta_norms(), names_of(stage.view(PEOPLE))[1:])
    other = random_bank(one, one.delta_norms(), names_of(stage.view(PEOPLE))[:1])
    for key, pair in again.pairs.items():
        assert torch.equal(pair.lora_A[0], both.pairs[key].lora_A[1])
        assert torch.equal(pair.lora_B[0], both.pairs[key].lora_B[1])
    assert any(not torch.equal(pair.lora_A, other.pairs[key].lora_A) for key, pair in again.pairs.items())


def test_measured_losses_are_asked_for_under_the_trained_and_the_random_weights(stage: Stage, bank: Bank) -> None:
    view, before = stage.view(PEOPLE), bank.parameter.detach().clone()

    def evaluate() -> list[dict[str, float]]:
        outputs = next(iter(view.outputs(view.texts, adapted=True, masked=True).values()))
        return [{"size": float(one.square().sum())} for one in outputs.pooled]

    with torch.no_grad():
        now = evaluate()
        probes = measured(stage, bank, view, evaluate=evaluate)
        assert [probe.measured_after for probe in probes] == now == evaluate()
        assert torch.equal(bank.parameter, before)
        assert stage.slot.bank is bank
        for prompt, probe in enumerate(probes):
            stage.slot.bank = random_bank(bank, bank.delta_norms(), names_of(stage.view(PEOPLE)))
            view.begin_evaluation()
            assert probe.measured_random == evaluate()[prompt] != probe.measured_after
    assert json.loads(json.dumps(probes[0].as_dict()))["random"]["specificity"]["ratio"] > 0


def test_without_paraphrases_or_controls_nothing_is_said_of_them(stage: Stage, bank: Bank) -> None:
    probe, _ = measured(stage, bank, stage.view(PEOPLE), paraphrases=(), controls=())
    told = probe.specificity
    assert (told.paraphrases, told.controls, told.ratio) == (None, None, None)
    assert told.own is not None
    assert told.empty is not None


def test_a_lora_that_does_nothing_moves_nothing_and_has_no_rank(stage: Stage, bank: Bank) -> None:
    with torch.no_grad():
        for pair in bank.pairs.values():
            pair.lora_B.zero_()
    for probe in measured(stage, bank, stage.view(PEOPLE)):
        assert probe.conditioning_shift == probe.random.conditioning_shift == probe.delta_norm == 0
        assert probe.effective_rank is probe.specificity.ratio is None


def test_numbers_that_are_not_finite_in_one_prompt_spoil_no_other(stage: Stage, bank: Bank) -> None:
    _, whole = measured(stage, bank, stage.view(PEOPLE))
    with torch.no_grad():
        for pair in bank.pairs.values():
            pair.lora_B[0] = math.nan
    _, beside = measured(stage, bank, stage.view(PEOPLE))
    assert beside == whole
