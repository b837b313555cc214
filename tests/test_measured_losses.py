"""Losses that are measured beside a run, schedules of a term's weight, prompts as options, and `{prompt}` in a text."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_keep_and_stop import same_weights

import lora_forge
from lora_forge import RunResult
from lora_forge.config.model import shipped_folder
from lora_forge.errors import ConfigError
from lora_forge.options import Text, parse_options
from lora_forge.prompts import prompts_field
from lora_forge.schedules import TERM_SCHEDULES, TermSchedule
from lora_forge.seeds import generator_for
from lora_forge.training import objective

PLUGIN = """
from dataclasses import dataclass
import torch
from lora_forge import LossSpec, OptimizerSpec, hookimpl
from lora_forge.prompts import prompts_field

def size(batch):
    return sum(out.last_hidden_state.square().mean((1, 2)) for out in batch.adapted().values())

def noisy(batch):
    latents, timesteps = batch.randn("latents", *batch.latent_shape), torch.full((batch.prompts,), 500)
    return batch.predict_noise(latents, timesteps, batch.adapted(), adapted=True).square().mean((1, 2, 3))

def drawn(batch):
    latents, timesteps = batch.randn("latents", *batch.latent_shape), torch.full((batch.prompts,), 500)
    noise = batch.predict_noise(latents, timesteps, batch.adapted(), adapted=True)
    return batch.randn("number") + 0 * noise.mean((1, 2, 3))

def broken(batch):
    raise ValueError("not on this model")

@dataclass(frozen=True)
class Near:
    other: tuple[str, ...] = prompts_field(default=("{prompt}, at night",), help="prompts to be near")

class NearLoss:
    def __init__(self, options):
        self.options = options

    def __call__(self, batch):
        total = 0
        for text in self.options.other:
            goal = batch.encode(text, adapted=False)
            for encoder, out in batch.adapted().items():
                total = total + (out.pooled - goal[encoder].pooled).square().mean(1)
        return total

def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)

@hookimpl
def lora_forge_optimizers():
    yield OptimizerSpec(name="sgd", summary="s", factory=sgd)

@hookimpl
def lora_forge_losses():
    yield LossSpec(name="size", summary="s", needs={"text"}, factory=size)
    yield LossSpec(name="noisy", summary="s", needs={"text", "noise_prediction"}, factory=noisy)
    yield LossSpec(name="drawn", summary="s", needs={"text", "noise_prediction"}, factory=drawn)
    yield LossSpec(name="broken", summary="s", needs={"text"}, factory=broken)
    yield LossSpec(name="near", summary="s", needs={"text"}, options=Near, factory=NearLoss)
"""


@pytest.fixture
def forge(tmp_path: Path) -> Callable[..., RunResult]:
    plugin = tmp_path / "measures.py"
    plugin.write_text(PLUGIN, encoding="utf-8")

    def run(**settings: Any) -> RunResult:
        return lora_forge.run("a steampunk owl", "tiny_sdxl", plugins=[plugin], **{"iterations": 4, **settings})

    return run


def test_a_measured_loss_has_the_value_it_has_as_an_objective_and_trains_nothing(
    forge: Callable[..., RunResult],
) -> None:
    plain, beside = forge(), forge(measure=["size"])
    assert same_weights(plain, beside)
    trained = forge(loss="size", iterations=0)
    before, after = beside.measured["size"]
    assert before == pytest.approx(trained.after.terms["size"], rel=1e-6)
    assert after != before
    assert plain.measured == {}


def test_measuring_leaves_the_noise_of_the_step_loop_as_it_was(forge: Callable[..., RunResult]) -> None:
    plain, beside = forge(loss="noisy", iterations=2), forge(loss="noisy", iterations=2, measure=["noisy", "size"])
    assert [one.loss for one in plain.steps] == [one.loss for one in beside.steps]
    assert same_weights(plain, beside)


def test_a_measured_loss_through_the_unet_is_the_mean_of_four_draws_that_no_step_sees(
    forge: Callable[..., RunResult],
) -> None:
    one = forge(iterations=2, measure=["drawn"])
    draws = [float(torch.randn((), generator=generator_for(f"0/drawn/{-draw}/number"))) for draw in (1, 2, 3, 4)]
    assert one.measured["drawn"] == pytest.approx((sum(draws) / 4, sum(draws) / 4), abs=1e-6)
    steps = [values.terms["drawn"] for values in forge(iterations=4, loss="drawn").steps]
    assert not set(steps) & set(draws)


def test_a_measured_loss_that_raises_has_no_value_and_costs_no_other(forge: Callable[..., RunResult]) -> None:
    result = forge(measure=["size", "broken"])
    assert result.measured["broken"] == (None, None)
    assert None not in result.measured["size"]
    assert any("'broken' has no value: " in warning for warning in result.warnings)
    assert same_weights(result, forge())


def test_a_measured_loss_does_not_change_which_encoders_the_objective_runs(
    forge: Callable[..., RunResult], tmp_path: Path
) -> None:
    config = json.loads((shipped_folder() / "tiny_sdxl_config.json").read_text(encoding="utf-8"))
    config["target_layers_text_encoder_2"] = []
    config["layer_dimensions_text_encoder_2"] = {}
    (tmp_path / "first_alone.json").write_text(json.dumps(config), encoding="utf-8")
    model = str(tmp_path / "first_alone.json")
    plain = lora_forge.run("an owl", model, iterations=3)
    beside = lora_forge.run("an owl", model, iterations=3, measure=["noisy"], plugins=[tmp_path / "measures.py"])
    assert [one.loss for one in plain.steps] == [one.loss for one in beside.steps]
    assert same_weights(plain, beside)
    assert [shift.name for shift in beside.effect.shifts] == [shift.name for shift in plain.effect.shifts]


def test_a_measured_loss_that_the_backend_cannot_serve_is_named(tmp_path: Path) -> None:
    plugin = tmp_path / "hearing.py"
    plugin.write_text(PLUGIN.replace('needs={"text", "noise_prediction"}', 'needs=lambda _: {"sound"}'))
    with pytest.raises(ConfigError, match="sound"):
        lora_forge.run("bond", "tiny_sdxl", plugins=[plugin], measure=["noisy"])


def test_a_schedule_of_zero_leaves_the_term_out_of_the_steps_but_not_of_the_values(
    forge: Callable[..., RunResult],
) -> None:
    terms = [{"name": "embedding_magnitude"}, {"name": "size", "weight": 3.0, "schedule": "constant:99-100"}]
    plain, scheduled = forge(), forge(loss=terms)
    assert same_weights(plain, scheduled)
    assert scheduled.after.loss == pytest.approx(plain.after.loss + 3.0 * scheduled.after.terms["size"], rel=1e-5)


def test_a_schedule_that_ends_is_two_runs_one_after_the_other(forge: Callable[..., RunResult], tmp_path: Path) -> None:
    sgd: dict[str, Any] = {"optimizer": "sgd", "l2": 0.0}
    first = forge(loss="size", iterations=2, output=tmp_path / "first.safetensors", **sgd)
    assert first.path is not None
    second = forge(loss="embedding_magnitude", iterations=2, init_from=tmp_path / "first.safetensors", **sgd)
    both = forge(loss=["size@constant:1-2", "embedding_magnitude@constant:3-4"], iterations=4, **sgd)
    assert same_weights(second, both)


@given(
    kind=st.sampled_from(TERM_SCHEDULES),
    bounds=st.none() | st.tuples(st.integers(1, 30), st.integers(0, 30)),
    step=st.integers(1, 80),
)
def test_schedules_stay_between_0_and_1_go_one_way_and_come_back_from_their_text(
    kind: str, bounds: tuple[int, int] | None, step: int
) -> None:
    schedule = TermSchedule(kind, *((bounds[0], bounds[0] + bounds[1]) if bounds else (None, None)))
    assert TermSchedule.read(str(schedule)) == schedule
    now, later = schedule.factor(step, 60), schedule.factor(step + 1, 60)
    assert 0 <= now <= 1
    if kind.endswith("_up"):
        assert later >= now
        assert schedule.factor(90, 60) == 1
    elif kind != "constant":
        assert later <= now
        assert schedule.factor(1, 60) == 1


def test_linear_and_cosine_are_halfway_in_the_middle() -> None:
    assert TermSchedule.read("linear:11-20").factor(16, 50) == pytest.approx(0.5)
    assert TermSchedule.read("cosine:11-20").factor(16, 50) == pytest.approx(0.5)
    assert TermSchedule.read("linear_up:11-20").factor(15, 50) == pytest.approx(0.5)
    assert [TermSchedule.read("constant:3-4").factor(step, 9) for step in (2, 3, 4, 5)] == [0, 1, 1, 0]


@pytest.mark.parametrize("text", ["lin", "linear:3", "linear:0-4", "linear:5-4", "linear:a-b", ""])
def test_a_schedule_that_cannot_be_read_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=r"loss\.schedule"):
        lora_forge.run("bond", "tiny_sdxl", loss={"name": "embedding_magnitude", "schedule": text})


def test_a_schedule_is_the_same_however_many_steps_factors_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    terms = [{"name": "embedding_magnitude", "schedule": "cosine"}, {"name": "embed_write", "schedule": "linear_up"}]

    def run() -> RunResult:
        return lora_forge.run("bond", "tiny_sdxl", iterations=8, loss=terms)

    whole = run()
    monkeypatch.setattr(objective, "STEPS_AT_ONCE", 3)
    assert same_weights(run(), whole)
    assert not same_weights(lora_forge.run("bond", "tiny_sdxl", iterations=8, loss=[t["name"] for t in terms]), whole)


@dataclass(frozen=True)
class _Prompts:
    neutral: tuple[str, ...] = prompts_field(default=("",), help="prompts")


def read(value: Any) -> Any:
    options, problems = parse_options(_Prompts, {"neutral": value}, key="x")
    return [str(problem) for problem in problems] or options.neutral


def test_prompts_are_one_text_a_list_or_a_file(tmp_path: Path) -> None:
    listed = tmp_path / "listed.txt"
    listed.write_text("an owl, at night\n\n  two chairs \nan owl, at night\n", encoding="utf-8")
    assert read(Text("an owl, at night")) == ("an owl, at night",)
    assert read(Text('["an owl", "@home, in bed"]')) == ("an owl", "@home, in bed")
    assert read(Text("[owl:1.2], weighted")) == ("[owl:1.2], weighted",)
    assert read(["a", "b"]) == ("a", "b")
    assert read(f"@{listed}") == ("an owl, at night", "two chairs")
    assert "cannot be read" in read(f"@{tmp_path / 'none.txt'}")[0]
    assert "expected a prompt" in read([1])[0]
    assert "at least one" in read([])[0]


def test_the_prompts_of_a_file_are_recorded_themselves_so_that_the_run_can_be_repeated(
    forge: Callable[..., RunResult], tmp_path: Path
) -> None:
    listed = tmp_path / "listed.txt"
    listed.write_text("an owl, at night\n", encoding="utf-8")
    result = forge(loss={"name": "near", "options": {"other": f"@{listed}"}})
    record = json.loads(result.metadata["lora_forge"])
    assert record["run"]["loss"][0]["options"]["other"] == ["an owl, at night"]


def test_prompt_in_braces_stands_for_each_prompts_own_text(forge: Callable[..., RunResult]) -> None:
    filled = forge(loss={"name": "near", "options": {"other": "{prompt}, at night"}}, iterations=2)
    written = forge(loss={"name": "near", "options": {"other": "a steampunk owl, at night"}}, iterations=2)
    assert same_weights(filled, written)
    second = forge(
        loss={"name": "near", "options": {"other": "{prompt}, at night"}}, prompt_2="a brass owl", iterations=0
    )
    assert second.after.terms["near"] != filled.before.terms["near"]


def test_measured_losses_are_shown_after_a_run(cli: Callable[..., Any], tmp_path: Path) -> None:
    common = ["--prompt", "bond", "--model", "tiny_sdxl", "--iterations", "2", "--output", tmp_path / "o.safetensors"]
    done = cli("run", *common, "--measure", "conditioning_magnitude")
    assert done.returncode == 0, done.stderr
    assert "measured: conditioning_magnitude" in done.stdout
