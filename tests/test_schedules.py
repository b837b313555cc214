"""Learning-rate schedules: held to transformers' own, as factors and in whole runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import get_scheduler

import lora_forge
from lora_forge import RunResult
from lora_forge.errors import ConfigError
from lora_forge.schedules import ScheduleOptions, scheduled

THEIRS = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
FACTOR = """
from dataclasses import dataclass, field
import torch
from lora_forge import OptimizerSpec, hookimpl

@dataclass(frozen=True)
class Filled:
    lr: float = 1.0

@dataclass(frozen=True)
class Kept:
    lr: float = field(default=1.0, metadata={"model_config": False})

def sgd(parameters, options):
    return torch.optim.SGD(parameters, lr=options.lr)

@hookimpl
def lora_forge_optimizers():
    yield OptimizerSpec(name="filled", summary="s", options=Filled, factory=sgd)
    yield OptimizerSpec(name="kept", summary="s", options=Kept, factory=sgd)
"""


class Recording:
    """The optimizer's parameters before the first step, and the gradients of each."""

    def __init__(self) -> None:
        self.start: list[torch.Tensor] = []
        self.gradients: list[list[torch.Tensor]] = []

    def hear(self, optimizer: Any, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if not self.start:
            self.start = [p.detach().clone() for p in parameters]
        self.gradients.append([p.grad.clone() for p in parameters])


@pytest.fixture
def recording() -> Iterator[Recording]:
    """Listens to every optimizer of torch."""
    made = Recording()
    handle = register_optimizer_step_pre_hook(made.hear)
    yield made
    handle.remove()


@settings(deadline=None, max_examples=150)
@given(
    schedule=st.sampled_from(sorted(THEIRS)),
    iterations=st.integers(0, 60),
    warmup=st.integers(0, 70),
)
def test_the_factor_of_every_step_is_transformers_own(schedule: Any, iterations: int, warmup: int) -> None:
    options = ScheduleOptions(schedule=schedule, warmup=warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(THEIRS[schedule], optimizer, warmup, iterations)
    for step in range(iterations + 1):
        assert options.factor(step, iterations) == theirs.get_last_lr()[0], step
        optimizer.step()
        theirs.step()


@given(iterations=st.integers(0, 60))
def test_constant_without_warmup_is_one_throughout(iterations: int) -> None:
    assert {ScheduleOptions().factor(step, iterations) for step in range(iterations + 1)} == {1.0}


@given(
    schedule=st.sampled_from(["linear", "cosine"]),
    iterations=st.integers(1, 60),
    warmup=st.integers(0, 70),
    beyond=st.integers(0, 100),
)
def test_a_falling_schedule_stays_between_0_and_1_and_does_not_rise_again(
    schedule: Any, iterations: int, warmup: int, beyond: int
) -> None:
    options = ScheduleOptions(schedule=schedule, warmup=warmup)
    factors = [options.factor(step, iterations) for step in range(max(iterations, warmup) + beyond + 1)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (ScheduleOptions(), [2.0, 2.0, 2.0, 2.0]),
        (ScheduleOptions(warmup=2), [0.0, 1.0, 2.0, 2.0]),
        (ScheduleOptions(schedule="linear"), [2.0, 1.5, 1.0, 0.5]),
        (ScheduleOptions(schedule="linear", warmup=2), [0.0, 1.0, 2.0, 1.0]),
    ],
)
def test_each_step_is_taken_at_its_own_learning_rate(options: ScheduleOptions, expected: list[float]) -> None:
    number = torch.nn.Parameter(torch.zeros(1))
    optimizer = scheduled(torch.optim.SGD([number], lr=2.0), options, iterations=4)
    moved = []
    for _ in range(4):
        before = number.item()
        number.grad = torch.ones(1)
        optimizer.step()
        moved.append(before - number.item())
    assert moved == expected


@pytest.mark.parametrize("schedule", sorted(THEIRS))
@pytest.mark.parametrize("warmup", [0, 3])
def test_a_run_with_adamw_equals_a_plain_loop_with_transformers_scheduler(
    recording: Recording, schedule: str, warmup: int
) -> None:
    result = run(12, lr=0.01, schedule=schedule, warmup=warmup)
    parameters, optimizer = plain(recording, lr=0.01)
    theirs = get_scheduler(THEIRS[schedule], optimizer, warmup, 12)
    assert torch.equal(flat(result), replay(recording, parameters, optimizer, theirs))


def test_a_falling_schedule_moves_less_than_a_constant_one() -> None:
    constant, falling = run(6), run(6, schedule="cosine")
    assert not torch.equal(flat(constant), flat(falling))
    shifts = [one.effect.conditioning_shift for one in (falling, constant)]
    assert None not in shifts
    assert shifts == sorted(map(float, filter(None, shifts))), "a smaller learning rate moved it further"


def test_default_adamw_gives_exactly_the_tensors_of_a_plain_loop(recording: Recording) -> None:
    result = run(12)
    parameters, optimizer = plain(recording, lr=1e-4)
    assert torch.equal(flat(result), replay(recording, parameters, optimizer))


def test_prompts_side_by_side_have_the_schedule_of_a_single_run() -> None:
    """With one optimizer for all, its schedule must not move once per prompt."""
    from lora_forge.clock import Clock
    from lora_forge.config.run import read_run_config
    from lora_forge.model import open_model
    from lora_forge.plan import Request, make_plan
    from lora_forge.plugins import discover
    from lora_forge.runner import forge

    optimizer = {"name": "adamw", "options": {"schedule": "cosine", "warmup": 2, "lr": 0.01}}
    settings = {"prompt": "an owl", "model": "tiny_sdxl", "iterations": 5, "optimizer": optimizer}
    registry = discover()
    plan = make_plan(read_run_config([settings]), registry)
    requests = [Request(prompt, None, 0, None) for prompt in ("an owl", "a brass fox")]
    together = forge(plan, requests, open_model(plan), registry, Clock())
    alone = lora_forge.run("a brass fox", "tiny_sdxl", iterations=5, optimizer=optimizer)
    assert [one.loss for one in together[1].steps] == pytest.approx([one.loss for one in alone.steps], rel=1e-6)
    torch.testing.assert_close(flat(together[1]), flat(alone), rtol=1e-4, atol=1e-6)


def test_the_files_record_holds_the_schedule() -> None:
    options = record(run(1, schedule="cosine", warmup=4))["options"]
    assert (options["schedule"], options["warmup"]) == ("cosine", 4)
    options = record(run(1))["options"]
    assert (options["schedule"], options["warmup"]) == ("constant", 0)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"schedule": "cosin"}, r"adamw\.schedule: 'cosin' is not a choice; did you mean 'cosine'"),
        ({"warmup": -1}, r"adamw\.warmup: must be ≥ 0"),
        ({"warmup": 0.5}, r"adamw\.warmup: expected an integer"),
    ],
)
def test_a_schedule_that_is_none_is_an_error(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        run(1, **options)


def test_a_learning_rate_that_is_a_factor_is_not_filled_from_the_model_config(tmp_path: Path) -> None:
    plugin = tmp_path / "factor.py"
    plugin.write_text(FACTOR, encoding="utf-8")

    def rate(optimizer: Any) -> float:
        result = lora_forge.run("an owl", "tiny_sdxl", iterations=0, optimizer=optimizer, plugins=[plugin])
        return float(record(result)["options"]["lr"])

    assert rate("filled") == 1e-4, "tiny_sdxl's"
    assert rate("kept") == 1.0
    assert rate({"name": "kept", "options": {"lr": 0.5}}) == 0.5


def run(iterations: int, **options: Any) -> RunResult:
    optimizer = {"name": "adamw", "options": options}
    return lora_forge.run("a steampunk owl", "tiny_sdxl", iterations=iterations, optimizer=optimizer)


def record(result: RunResult) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.metadata["lora_forge"])["run"]["optimizer"]
    return found


def flat(result: RunResult) -> torch.Tensor:
    """All weights of a result in one row: of each layer A, then B, in the order of the result."""
    pairs = [pair for layers in result.weights.values() for pair in layers.values()]
    return torch.cat([pair[name].flatten() for pair in pairs for name in ("lora_A", "lora_B")])


def plain(recording: Recording, lr: float) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    """torch's AdamW where the recorded run started."""
    parameters = [torch.nn.Parameter(one.clone()) for one in recording.start]
    return parameters, torch.optim.AdamW(parameters, lr=lr, fused=True)


def replay(
    recording: Recording, parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, scheduler: Any = None
) -> torch.Tensor:
    """The weights, in one row, after a plain loop over the gradients that a run had."""
    recorded = list(recording.gradients)  # this loop is heard, too
    for gradients in recorded:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        if scheduler:
            scheduler.step()
    return torch.cat([parameter.detach().flatten() for parameter in parameters])
