"""Prompts that share a bank: each comes out as if it were alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import specification
import torch

from lora_forge.batch import ModelView
from lora_forge.clock import Clock
from lora_forge.config.run import read_run_config
from lora_forge.effect.measure import Shift, conditioning_shifts
from lora_forge.jobs import memory
from lora_forge.model import open_model
from lora_forge.plan import Request, make_plan
from lora_forge.plugins import discover
from lora_forge.result import RunResult
from lora_forge.runner import forge, run_infos
from lora_forge.training import strength
from lora_forge.training.train import train

PROMPTS = ("a steampunk owl", "bond", "a squirrel in a forest")
SMOOTH = """
from lora_forge import LossSpec, hookimpl

def squares(batch):
    means = [out.last_hidden_state.square().mean((1, 2)) for out in batch.adapted(masked=True).values()]
    return -sum(means) / len(means)

@hookimpl
def lora_forge_losses():
    yield LossSpec(name="squares", summary="mean|h| without its kinks", factory=squares)
"""

PLUGIN = """
import torch
from lora_forge import OptimizerSpec, hookimpl

class Normalized(torch.optim.SGD):
    '''A step whose length is the whole gradient's: not elementwise.'''

    def step(self):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        length = torch.stack([g.norm() for g in gradients]).norm()
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(0.01 * p.grad / length)

def normalized(parameters):
    return Normalized(parameters, lr=0.01)

@hookimpl
def lora_forge_optimizers():
    yield OptimizerSpec(name="normalized", summary="", factory=normalized)
"""


def forge_together(
    prompts: Sequence[str], model: str = "tiny_sdxl", plugins: Sequence[Path] = (), **settings: object
) -> list[RunResult]:
    registry = discover(list(plugins))
    plan = make_plan(read_run_config([{"prompt": prompts[0], "model": model, **settings}]), registry)
    requests = [Request(prompt, None, seed, None) for seed, prompt in enumerate(prompts)]
    return forge(plan, requests, open_model(plan), registry, Clock())


def assert_same(one: RunResult, other: RunResult, tolerance: float) -> None:
    for component, layers in one.weights.items():
        for layer, pair in layers.items():
            for name, expected in pair.items():
                found = other.weights[component][layer][name]
                difference = float((found - expected).norm())
                assert difference <= tolerance * float(expected.norm()), (component, layer, name)


def test_three_prompts_together_equal_three_single_runs(model: str) -> None:
    together = forge_together(PROMPTS, model, iterations=20)
    for seed, prompt in enumerate(PROMPTS):
        (alone,) = _alone(prompt, model, seed)
        assert_same(alone, together[seed], 1e-5)
        assert [v.loss for v in together[seed].steps] == pytest.approx([v.loss for v in alone.steps], rel=1e-5)
        assert together[seed].effect.conditioning_shift == pytest.approx(alone.effect.conditioning_shift, rel=1e-4)


@pytest.mark.parametrize("beside", [0, 2, 7])
def test_fifty_steps_of_a_smooth_loss_are_the_naive_computations_whatever_the_batch(
    model: str, model_folder: Path, tmp_path: Path, beside: int
) -> None:
    plugin = tmp_path / "smooth.py"
    plugin.write_text(SMOOTH)
    prompts = (PROMPTS[0], *(f"{number} brass foxes" for number in range(beside)))
    start = forge_together(prompts, model, [plugin], iterations=0)[0].weights
    ours = forge_together(prompts, model, [plugin], iterations=50, loss="squares")[0]
    naive = specification.forge(model_folder, prompts[0], start, rank=4, alpha=4, iterations=50, size=torch.square)
    assert [step.loss for step in ours.steps] == pytest.approx(naive.losses, rel=1e-5)
    for component, layers in naive.weights.items():
        for layer, pair in layers.items():
            for name, expected in pair.items():
                found = ours.weights[component][layer][name]
                assert float((found - expected).norm()) <= 1e-5 * float(expected.norm()), (component, layer, name)


def _alone(prompt: str, model: str, seed: int) -> list[RunResult]:
    registry = discover()
    plan = make_plan(read_run_config([{"prompt": prompt, "model": model, "iterations": 20}]), registry)
    return forge(plan, [Request(prompt, None, seed, None)], open_model(plan), registry, Clock())


def test_layers_out_of_reach_are_equal_to_the_bit_whatever_the_batch(model: str) -> None:
    together, (alone,) = forge_together(PROMPTS, model, iterations=5), forge_together(PROMPTS[:1], model, iterations=5)
    for layer, pair in alone.weights["unet"].items():
        assert torch.equal(together[0].weights["unet"][layer]["lora_A"], pair["lora_A"])


def test_an_optimizer_that_is_not_elementwise_trains_each_prompt_alone(model: str, tmp_path: Path) -> None:
    plugin = tmp_path / "normalized.py"
    plugin.write_text(PLUGIN)
    settings = {"iterations": 5, "optimizer": "normalized"}
    together = forge_together(PROMPTS, model, [plugin], **settings)
    (alone,) = forge_together(PROMPTS[:1], model, [plugin], **settings)
    assert_same(alone, together[0], 1e-5)
    assert together[0].loss_after < together[0].loss_before


def test_every_prompt_reaches_the_target_shift_asked_for(model: str) -> None:
    for result in forge_together(PROMPTS, model, iterations=5, target_shift=0.1):
        assert result.effect.conditioning_shift == pytest.approx(0.1, rel=2e-3)


def test_ids_depend_on_the_request_and_cut_texts_are_told_of_their_own_prompt() -> None:
    long = "owl " * 90
    one, other = forge_together(["bond", long], iterations=0), forge_together(["bond", "owl"], iterations=0)
    assert one[0].run.id == other[0].run.id
    assert one[1].run.id != other[1].run.id
    assert one[0].run.batch_id == one[1].run.batch_id != other[0].run.batch_id
    assert [any("cut off" in warning for warning in result.warnings) for result in one] == [False, True]


FAILING = """
import torch
from lora_forge import LossSpec, hookimpl

class Turning:
    '''NaN from the third step on, for every prompt that says so.'''

    def __init__(self):
        self.calls = 0

    def __call__(self, batch):
        self.calls += 1
        bad = ["bad" in text and self.calls > 2 for text in next(iter(batch.texts.values()))]
        size = sum(out.last_hidden_state.square().mean((1, 2)) for out in batch.adapted().values())
        return size * torch.tensor([float("nan") if one else 1.0 for one in bad])

@hookimpl
def lora_forge_losses():
    yield LossSpec(name="turning", summary="", factory=Turning)
"""


def test_a_prompt_that_fails_leaves_those_beside_it_as_they_are_to_the_bit(tmp_path: Path) -> None:
    plugin = tmp_path / "failing.py"
    plugin.write_text(FAILING)
    registry = discover([plugin])
    plan = make_plan(
        read_run_config([{"prompt": "an owl", "model": "tiny_sdxl", "loss": "turning", "iterations": 6}]), registry
    )
    trained = []
    for second in ("a bad fox", "a red fox"):
        requests = [Request(prompt, None, 0, None) for prompt in ("an owl", second, "a cup")]
        trained.append(train(plan, requests, run_infos(plan, requests), open_model(plan), registry, Clock()))
    failing, sound = trained
    error = failing.failures[1]
    assert error is not None
    assert (error.step, error.term) == (3, "turning")
    assert len(failing.steps[1]) == 2
    for prompt in (0, 2):
        assert failing.failures[prompt] is None
        assert failing.steps[prompt] == sound.steps[prompt]
        assert failing.effects[prompt] == sound.effects[prompt]
        assert torch.equal(failing.bank.parameter[prompt], sound.bank.parameter[prompt])


def test_a_prompt_that_reaches_no_target_shift_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strength, "LARGEST_FACTOR", 8.0)  # far enough for the prompt that was trained
    registry = discover()
    settings = {"prompt": "an owl", "model": "tiny_sdxl", "iterations": 20, "target_shift": 0.05}
    plan = make_plan(read_run_config([{**settings, "optimizer": {"name": "adamw", "options": {"lr": 0.01}}}]), registry)
    requests = [Request(prompt, None, 0, None) for prompt in ("an owl", "a fox")]

    def stuck(view: ModelView) -> list[list[Shift]]:
        first, second = conditioning_shifts(view)
        return [first, [replace(shift, relative=0.0) for shift in second]]

    monkeypatch.setattr(strength, "conditioning_shifts", stuck)
    trained = train(plan, requests, run_infos(plan, requests), open_model(plan), registry, Clock())
    assert trained.failures[0] is None
    assert trained.effects[0].conditioning_shift == pytest.approx(0.05, rel=2e-3)
    assert "no strength moves the conditioning by 0.05" in str(trained.failures[1])


def test_what_a_prompt_takes_of_memory_is_the_same_for_every_prompt_and_more_than_its_bank() -> None:
    registry = discover()
    plan = make_plan(read_run_config([{"prompt": "an owl", "model": "tiny_sdxl"}]), registry)
    model, request = open_model(plan), Request("an owl", None, 0, None)
    per_prompt = memory.bytes_per_prompt(plan, request, model)
    numbers = sum(plan.rank * (layer.in_features + layer.out_features) for layer in model.layers)
    hidden = sum(77 * model.backend._modules[one].config.hidden_size * 4 for one in plan.encoders)  # type: ignore[attr-defined]
    assert per_prompt > 16 * numbers + hidden
    with model.use(plan, Clock()):
        sizes = [memory._saved_bytes(plan, [request] * prompts, model) for prompts in (2, 3, 5)]
    assert sizes[1] - sizes[0] == per_prompt
    assert sizes[2] - sizes[0] == 3 * per_prompt
