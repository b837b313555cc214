"""The conformance kit: plugins that break one rule of their contract are told so in words, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from rule_breakers import Breaker, backends, closed_forms, executors, initializers, losses, optimizers, savers
from rule_breakers.toy_backend import ToyBackend
from torch import nn

from lora_forge.plugins import discover
from lora_forge.records import Spec
from lora_forge.testing import RULES, examine

KINDS = {
    "loss": losses.BREAKERS + closed_forms.BREAKERS,
    "initializer": initializers.BREAKERS,
    "optimizer": optimizers.BREAKERS,
    "saver": savers.BREAKERS,
    "backend": backends.BREAKERS,
    "executor": executors.BREAKERS,
}
SHARED = {"record", "bounds", "options", "builds"}  # see test_conformance_options
BUILT_IN = [one.spec for specs in discover().supplied.values() for one in specs if one.is_builtin]


@pytest.mark.parametrize("breaker", [one for breakers in KINDS.values() for one in breakers], ids=str)
def test_a_plugin_that_breaks_one_rule_is_told_so_in_words_and_of_no_other(breaker: Breaker) -> None:
    examination = examine(breaker.spec, breaker.options)
    assert [finding.rule for finding in examination.findings] == [breaker.rule], examination.findings
    (finding,) = examination.findings
    assert breaker.rule in examination.checked
    missing = [word for word in breaker.words if word not in finding.message]
    assert not missing, f"{finding.message!r} lacks {missing}"
    assert "\n" not in finding.message


@pytest.mark.parametrize("kind", KINDS)
def test_each_rule_has_a_plugin_that_breaks_it(kind: str) -> None:
    assert {breaker.rule for breaker in KINDS[kind]} >= set(RULES[kind]) - SHARED


@pytest.mark.parametrize("spec", BUILT_IN, ids=lambda spec: spec.name)
def test_built_ins_keep_every_rule(spec: Spec) -> None:
    examination = examine(spec)
    assert examination.findings == ()
    assert set(examination.checked) == set(RULES[spec.kind])


def momentum(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def nadam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.NAdam(parameters, lr=1e-3)


@pytest.mark.parametrize(
    ("spec", "unchecked"),
    [
        (losses.spec(losses.good), set()),
        (losses.spec(losses.denoising, needs=losses.BOTH), set()),
        (losses.spec(losses.first_encoder_only), set()),
        (losses.spec(closed_forms.Good, closed_form=True), set()),
        (losses.spec(losses.refuses_one_encoder), set()),
        (initializers.spec(initializers.good), set()),
        (initializers.spec(initializers.given_a_gradient, gradient=True), set()),
        (optimizers.spec(optimizers.Descent, elementwise=True), set()),
        (optimizers.spec(momentum, elementwise=True), set()),
        (optimizers.spec(nadam, elementwise=True), set()),
        (optimizers.spec(optimizers.clipping), {"elementwise"}),
        (optimizers.spec(optimizers.adafactor), {"elementwise"}),
        (savers.spec(savers.pickled, suffix=".pt", reader=savers.unpickled), set()),
        (savers.spec(savers.pickled, suffix=".pt", reader="rule_breakers.savers:unpickled"), set()),
        (savers.spec(savers.refuses_others), set()),
        (backends.GOOD, set()),
        (backends.TEXT_ONLY, {"noise", "schedule", "attention", "decode"}),
        (executors.spec(executors.good), set()),
        (executors.spec(executors.good, local=True), set()),
        (executors.spec(executors.in_another_process), set()),
    ],
)
def test_plugins_as_people_write_them_keep_every_rule_that_concerns_them(spec: Spec, unchecked: set[str]) -> None:
    examination = examine(spec)
    assert examination.findings == ()
    assert set(RULES[spec.kind]) - set(examination.checked) == unchecked


class FailsToPredict(ToyBackend):
    def predict_noise(self, *_: object) -> torch.Tensor:
        raise RuntimeError("no such dtype")


def test_a_rule_whose_check_an_error_cut_short_is_not_told_as_checked() -> None:
    examination = examine(backends.spec(FailsToPredict))
    (finding,) = examination.findings
    assert finding.rule == "runs"
    assert RULES["backend"]["noise"] in finding.message
    assert "conditioning" in examination.checked
    assert "noise" not in examination.checked


def test_two_backends_that_recognize_one_tiny_model_are_told_so() -> None:
    twin = replace(backends.GOOD, name="twin")
    for one, other in ((backends.GOOD, twin), (twin, backends.GOOD)):
        (finding,) = examine(one, beside=[other]).findings
        assert finding.rule == "opens"
        assert f"its tiny model 'toy' is recognized by backend {other.name!r} too" in finding.message
    assert examine(twin, beside=[twin, replace(backends.GOOD, recognizes=None)]).findings == ()


def test_a_backend_that_claims_the_tiny_model_of_one_that_ships_is_told_so(model: str) -> None:
    spec = backends.spec(lambda request: ToyBackend(), recognizes=lambda source: source == model, tiny=model)
    (finding,) = examine(spec).findings
    assert f"its tiny model {model!r} is recognized by backend" in finding.message
