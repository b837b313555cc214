"""Which iterate is kept, and when training ends early: held to runs of exactly so many steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_many_prompts import PROMPTS, assert_same, forge_together

import lora_forge
from lora_forge import RunResult
from lora_forge.bank import Bank
from lora_forge.clock import Clock
from lora_forge.config.run import read_run_config
from lora_forge.config.stopping import StopRule
from lora_forge.contracts import TargetLayer
from lora_forge.errors import ConfigError, UsageError
from lora_forge.model import open_model
from lora_forge.options import Unfit
from lora_forge.plan import Request, make_plan
from lora_forge.plugins import discover
from lora_forge.runner import run_infos
from lora_forge.training.keeping import Keeper
from lora_forge.training.train import train

LEAPING: dict[str, Any] = {
    "optimizer": {"name": "adamw", "options": {"lr": 0.2}}
}  # so far that the objective falls and rises again


def run(iterations: int, prompt: str = PROMPTS[0], **settings: Any) -> RunResult:
    return forge_together([prompt], iterations=iterations, **LEAPING, **settings)[0]


def same_weights(one: RunResult, other: RunResult) -> bool:
    return all(
        torch.equal(tensor, other.weights[component][layer][name])
        for component, layers in one.weights.items()
        for layer, pair in layers.items()
        for name, tensor in pair.items()
    )


@pytest.fixture(scope="module")
def runs() -> list[RunResult]:
    """Runs of 0, 1, … 12 steps."""
    return [run(iterations) for iterations in range(13)]


def test_best_keeps_the_iterate_with_the_lowest_objective_to_the_bit(runs: list[RunResult]) -> None:
    lowest = min(range(13), key=lambda updates: runs[updates].loss_after)
    assert 0 < lowest < 12, "the objective should fall, and rise again"
    best = run(12, keep="best")
    assert best.updates == lowest
    assert best.loss_after == runs[lowest].loss_after < runs[-1].loss_after
    assert same_weights(best, runs[lowest])


def test_best_is_the_last_where_the_objective_falls_all_the_way(runs: list[RunResult]) -> None:
    lowest = min(range(13), key=lambda updates: runs[updates].loss_after)
    best = run(lowest, keep="best")
    assert best.updates == lowest
    assert same_weights(best, runs[lowest])


def test_each_prompt_of_a_batch_keeps_its_own_best() -> None:
    settings: dict[str, Any] = {"keep": "best", "iterations": 10, **LEAPING}
    together = forge_together(PROMPTS, **settings)
    alone = forge_together(PROMPTS[:1], **settings)[0]
    assert together[0].updates == alone.updates
    assert_same(alone, together[0], 1e-5)


def test_training_stops_where_the_loss_is_low_enough_with_the_weights_it_had_there(runs: list[RunResult]) -> None:
    values = [values.loss for values in runs[-1].steps]
    enough = values[3]
    first = next(number for number, value in enumerate(values) if value <= enough)
    stopped = run(12, stop_when=[f"loss:{enough!r}"])
    assert stopped.updates == first
    assert [values.loss for values in stopped.steps] == values[:first]
    assert same_weights(stopped, runs[first])


def test_a_prompt_that_stops_does_not_stop_the_others_of_its_batch(runs: list[RunResult]) -> None:
    enough = runs[-1].steps[2].loss
    settings: dict[str, Any] = {"iterations": 12, **LEAPING, "stop_when": [f"loss:{enough + 1e-6}"]}
    together = forge_together([PROMPTS[0], "bond"], **settings)
    alone = [forge_together(["bond"], **settings), forge_together([PROMPTS[0]], **settings)]
    assert together[0].updates == alone[1][0].updates < 12
    assert_same(alone[1][0], together[0], 1e-5)
    free = forge_together([PROMPTS[0], "bond"], iterations=12, **LEAPING)
    if not together[1].updates < 12:
        assert_same(free[1], together[1], 1e-5)


def naive_plateau(values: list[float], steps: int, share: float) -> int | None:
    """How many updates are made before `steps` values in a row are no lower than the lowest that counted."""
    reference, waited = values[0], 0
    for updates, value in enumerate(values[1:], 1):
        if value < reference - share * abs(reference):
            reference, waited = value, 0
        else:
            waited += 1
        if waited >= steps:
            return updates
    return None


def test_a_plateau_ends_training(runs: list[RunResult]) -> None:
    values = [values.loss for values in runs[-1].steps]
    expected = naive_plateau(values, 2, 0.05)
    assert expected is not None, values
    stopped = run(12, stop_when=["plateau:2:0.05"])
    assert stopped.updates == expected
    assert same_weights(stopped, runs[expected])


@given(
    values=st.lists(st.lists(st.integers(-4, 4).map(float), min_size=9, max_size=9), min_size=1, max_size=3),
    steps=st.integers(1, 4),
    share=st.sampled_from([0.0, 0.25, 1.0]),
    enough=st.integers(-5, 4).map(float),
    best=st.booleans(),
)
def test_any_curve_is_stopped_and_kept_as_a_loop_over_one_prompt_would(
    values: list[list[float]], steps: int, share: float, enough: float, best: bool
) -> None:
    bank = Bank([TargetLayer("text_encoder", "layer", 1, 1)], rank=1, alpha=1.0, prompts=len(values))
    rules = [StopRule.read(f"plateau:{steps}:{share}"), StopRule.read(f"loss:{enough}")]
    keeper = Keeper(bank, rules, best=best)
    curve = torch.tensor(values)
    for step in range(1, 9):  # the weights of an iterate are its number
        bank.parameter.data.fill_(step - 1)
        keeper.see(step, curve[:, step - 1])
    bank.parameter.data.fill_(8)
    keeper.finish(curve[:, 8], 8)
    for row, own in enumerate(values):
        stops = [naive_plateau(own[:8], steps, share), next((n for n, v in enumerate(own[:8]) if v <= enough), None)]
        last = min((stop for stop in stops if stop is not None), default=8)
        expected = min(range(last + 1), key=lambda updates: own[updates]) if best else last
        assert set(bank.parameter[row].tolist()) == {expected}
        assert int(keeper.updates[row]) == expected


def test_seconds_end_training_after_a_step() -> None:
    result = run(10**6, stop_when=["seconds:0.2"])
    assert 0 < result.updates == len(result.steps) < 10**6


@pytest.mark.parametrize(
    "text",
    ["plateau", "plateau:0", "plateau:1.5", "plateau:3:-1", "loss", "loss:low", "loss:nan", "seconds:0", "never:1"],
)
def test_a_rule_that_cannot_be_read_is_named(text: str) -> None:
    with pytest.raises(Unfit, match=r"expected|a plateau is"):
        StopRule.read(text)
    with pytest.raises(ConfigError, match="stop_when"):
        lora_forge.run("bond", "tiny_sdxl", stop_when=[text])


def test_what_was_kept_is_said_and_recorded(cli: Callable[..., Any], tmp_path: Path) -> None:
    common = ["run", "--prompt", PROMPTS[0], "--model", "tiny_sdxl", "--iterations", "12", "--optimizer-opt", "lr=0.2"]
    done = cli(*common, "--keep", "best", "--stop-when", "plateau:50", "--output", tmp_path / "owl.safetensors")
    assert done.returncode == 0, done.stderr
    assert "of 12 steps" in done.stdout
    dry = cli(*common, "--keep", "best", "--stop-when", "plateau:50", "--dry-run", "--json")
    record = json.loads(dry.stdout)
    assert record["keep"] == "best"
    assert record["stop_when"] == ["plateau:50"]


AVERAGING = """
import torch
from lora_forge import OptimizerSpec, hookimpl

class Averaging(torch.optim.SGD):
    def eval(self):
        pass

def averaging(parameters):
    return Averaging(parameters, lr=0.1)

@hookimpl
def lora_forge_optimizers():
    yield OptimizerSpec(name="averaging", summary="s", factory=averaging, elementwise=True)
"""


@pytest.mark.parametrize("settings", [{"keep": "best"}, {"stop_when": ["plateau:3"]}])
def test_an_optimizer_whose_result_are_no_steps_weights_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "averaging.py").write_text(AVERAGING, encoding="utf-8")
    given: dict[str, Any] = {"optimizer": "averaging", "plugins": [tmp_path / "averaging.py"], "iterations": 2}
    with pytest.raises(UsageError, match="'averaging' averages its weights"):
        lora_forge.run("bond", "tiny_sdxl", **given, **settings)
    assert lora_forge.run("bond", "tiny_sdxl", **given, stop_when=["seconds:60"]).updates == 2


def test_even_the_shortest_time_is_one_step_so_that_its_reach_is_known() -> None:
    result = run(5, stop_when=["seconds:1e-9"])
    assert result.updates == len(result.steps) == 1
    assert len(result.inert) == 136


def test_a_prompt_that_failed_does_not_keep_its_batch_from_stopping(tmp_path: Path) -> None:
    (tmp_path / "lost.py").write_text(LOST, encoding="utf-8")
    settings: dict[str, Any] = {"model": "tiny_sdxl", "plugins": [tmp_path / "lost.py"], "loss": "lost"}
    registry = discover(settings["plugins"])
    plan = make_plan(
        read_run_config([{**settings, "prompt": "x", "iterations": 10**6, "stop_when": ["loss:1e9"]}]), registry
    )
    requests = [Request(prompt, None, 0, None) for prompt in ("bond", "an owl")]
    trained = train(plan, requests, run_infos(plan, requests), open_model(plan), registry, Clock())
    assert [bool(trained.failures[index]) for index in (0, 1)] == [True, False]
    assert trained.taken < 10**6


LOST = """
import torch
from lora_forge import LossSpec, hookimpl

def lost(batch):
    (texts, *_) = batch.texts.values()
    factors = torch.tensor([float("nan") if text == "bond" else 1.0 for text in texts])
    return factors * sum(one.pooled.sum(1) for one in batch.adapted().values())

@hookimpl
def lora_forge_losses():
    yield LossSpec(name="lost", summary="s", factory=lost)
"""
