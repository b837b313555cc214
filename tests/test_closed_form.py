"""A loss with a closed form is solved for in place of the step loop, and is a loss like any other beside others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rule_breakers.closed_forms import Good
from rule_breakers.closed_forms import TooWide as TooWide
from rule_breakers.toy_backend import ToyBackend
from safetensors.torch import load_file
from tiny_models import target_layers

import lora_forge
from lora_forge.bank import BankSlot
from lora_forge.batch import Batch, ModelView
from lora_forge.cli.main import main
from lora_forge.clip_unet.family import Family
from lora_forge.clock import Clock
from lora_forge.config.run import read_run_config
from lora_forge.contracts import Backend, LoraWeights, SolveRequest, TargetLayer
from lora_forge.errors import LoraForgeError, ObjectiveError, PluginError, RunFailed, UndeclaredNeed
from lora_forge.model import open_model
from lora_forge.plan import Request, make_plan
from lora_forge.plugins import discover
from lora_forge.result import RunResult
from lora_forge.runner import forge, run_infos
from lora_forge.testing.stage import backend_of, open_backend
from lora_forge.training.train import train

PROMPTS = ("a steampunk owl", "bond", "a squirrel in a forest")
SHARES = [0.05, 0.03, 0.07]  # a hundredth for each token, the two at the ends included
FIRST = ("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj")

PLUGIN = """
from lora_forge import LossSpec, hookimpl

@hookimpl
def lora_forge_losses():
    for name in ("Good", "OnlyFirst", "NotForBond", "TooWide", "Unsolvable", "OfTheUnet"):
        yield LossSpec(name=name.lower(), summary="", closed_form=True, factory=f"test_closed_form:{name}")
"""


class OnlyFirst(Good):
    """Solves for one layer and leaves the others as they are."""

    def solve(self, request: SolveRequest) -> LoraWeights:
        return {FIRST[0]: {FIRST[1]: super().solve(request)[FIRST[0]][FIRST[1]]}}


class NotForBond(Good):
    def solve(self, request: SolveRequest) -> LoraWeights:
        solution = super().solve(request)
        bad = torch.tensor([text == "bond" for text in request.batch.texts["text_encoder"]])
        for pair in solution["text_encoder"].values():
            pair["lora_B"] = torch.where(bad[:, None, None], torch.nan, pair["lora_B"])
        return solution


class Unsolvable:
    def __call__(self, batch: Batch) -> torch.Tensor:
        return Good()(batch)


class OfTheUnet(Good):
    def __call__(self, batch: Batch) -> torch.Tensor:
        unet = next(layer for layer in batch.layers if layer.component == "unet")
        return Good()(batch) + batch.weight(unet).sum()


@pytest.fixture
def plugin(tmp_path: Path) -> str:
    path = tmp_path / "closed.py"
    path.write_text(PLUGIN)
    return str(path)


def forged(plugin: str, loss: Any, prompts: Sequence[str] = PROMPTS, **settings: Any) -> list[RunResult]:
    registry = discover([Path(plugin)])
    config = {"prompt": prompts[0], "model": "tiny_sdxl", "loss": loss, **settings}
    plan = make_plan(read_run_config([config]), registry)
    requests = [Request(prompt, None, seed, None) for seed, prompt in enumerate(prompts)]
    return forge(plan, requests, open_model(plan), registry, Clock())


def frozen_weights(model: str, encoders: Sequence[str]) -> tuple[Backend, dict[tuple[str, str], torch.Tensor]]:
    """A tiny model with these encoders loaded, and its weights as they are in its files."""
    spec = backend_of(model)
    backend = open_backend(spec, spec.options())
    backend.load(encoders)
    files = {}
    for component in encoders:
        (file,) = backend._source.weight_files(component)
        for name, value in load_file(file).items():
            files[component, name.removesuffix(".weight")] = value.float()
    return backend, files


def test_it_is_solved_for_without_a_step_and_without_an_optimizer(plugin: str) -> None:
    bare = {"loss": "good", "optimizer": {"name": "adamw", "options": {"lr": 1e30}}, "iterations": 50}
    (result,) = forged(plugin, prompts=PROMPTS[:1], rank=3, alpha=5, **bare)
    assert result.steps == ()
    assert (result.run.iterations, result.updates) == (0, 0)
    assert json.loads(result.metadata["lora_forge"])["run"]["iterations"] == 0
    # By hand: half a hundredth of each weight, of which the largest three singular values are taken.
    _, files = frozen_weights("tiny_sdxl", ["text_encoder", "text_encoder_2"])
    before = after = 0.0
    for component in ("text_encoder", "text_encoder_2"):
        for layer, pair in result.weights[component].items():
            wanted = -SHARES[0] * files[component, layer].double()
            u, s, vh = torch.linalg.svd(wanted)
            best = u[:, :3] * s[:3] @ vh[:3]
            delta = 5 / 3 * (pair["lora_B"].double() @ pair["lora_A"].double())
            assert torch.allclose(delta, best, atol=1e-6)
            before, after = before + float(s.square().sum()), after + float(s[3:].square().sum())
    assert result.before.terms["good"] == pytest.approx(before, rel=1e-5)
    assert result.after.terms["good"] == pytest.approx(after, rel=1e-5)


def test_prompts_that_are_solved_for_together_come_out_as_each_does_alone(plugin: str) -> None:
    together = forged(plugin, "good")
    for seed, result in enumerate(together):
        alone = lora_forge.run(PROMPTS[seed], "tiny_sdxl", seed=seed, loss="good", plugins=[plugin])
        for component, layers in result.weights.items():
            for layer, pair in layers.items():
                for name, matrix in pair.items():
                    assert torch.allclose(matrix, alone.weights[component][layer][name], atol=1e-6)
    norms = [result.effect.components[0].delta_norm for result in together]
    assert norms == pytest.approx([norms[0] * share / SHARES[0] for share in SHARES], rel=1e-4)


def test_layers_it_leaves_out_stay_as_the_initializer_made_them(plugin: str) -> None:
    initial = lora_forge.run(PROMPTS[0], "tiny_sdxl", iterations=0).weights
    (result,) = forged(plugin, "onlyfirst", PROMPTS[:1])
    for component, layers in result.weights.items():
        for layer, pair in layers.items():
            same = torch.equal(pair["lora_A"], initial[component][layer]["lora_A"])
            assert same is ((component, layer) != FIRST)
            assert bool(pair["lora_B"].any()) is ((component, layer) == FIRST)


def test_layers_out_of_reach_of_its_value_can_be_left_out_of_the_file(plugin: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    result = lora_forge.run(PROMPTS[0], "tiny_sdxl", loss="good", plugins=[plugin], inert="drop", output=path)
    assert {name.split(".")[0] for name in result.dropped} == {"unet"}
    assert not any("unet" in name for name in load_file(path))
    assert result.effect.conditioning_shift


def test_among_other_terms_it_is_trained_like_them(plugin: str) -> None:
    loss = ["good", "embedding_magnitude"]
    (result,) = forged(plugin, loss, PROMPTS[:1], iterations=4)
    assert len(result.steps) == 4
    assert result.after.terms["good"] < result.before.terms["good"]
    (opposite,) = forged(plugin, {"name": "good", "weight": -1.0}, PROMPTS[:1], iterations=4)
    assert len(opposite.steps) == 4
    assert opposite.after.terms["good"] > opposite.before.terms["good"]


def test_its_solution_can_be_scaled_and_best_is_what_it_solved_for(plugin: str) -> None:
    (whole,) = forged(plugin, "good", PROMPTS[:1], keep="best")
    (half,) = forged(plugin, "good", PROMPTS[:1], strength=0.5)
    assert whole.before == half.before
    assert half.effect.components[0].delta_norm == pytest.approx(whole.effect.components[0].delta_norm / 2)
    assert whole.after.terms["good"] < half.after.terms["good"] < half.before.terms["good"]


@pytest.mark.parametrize(
    ("loss", "error", "words"),
    [
        ("toowide", RunFailed, "loss 'toowide': solve() gives text_encoder.text_model.encoder.layers.0"),
        (
            "unsolvable",
            PluginError,
            "'unsolvable' is declared closed_form, but what its factory gives has no solve()",
        ),
        (
            "oftheunet",
            UndeclaredNeed,
            "'oftheunet' asks for a weight of unet, which no need of its spec has loaded",
        ),
    ],
)
def test_a_solution_that_is_none_is_said_in_one_line(
    plugin: str, loss: str, error: type[LoraForgeError], words: str
) -> None:
    with pytest.raises(error) as caught:
        forged(plugin, loss)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_prompt_without_a_finite_solution_fails_alone(plugin: str) -> None:
    registry = discover([Path(plugin)])
    plan = make_plan(read_run_config([{"prompt": "bond", "model": "tiny_sdxl", "loss": "notforbond"}]), registry)
    requests = [Request(prompt, None, seed, None) for seed, prompt in enumerate(PROMPTS)]
    trained = train(plan, requests, run_infos(plan, requests), open_model(plan), registry, Clock())
    assert [trained.failures[index] is not None for index in range(3)] == [False, True, False]
    assert str(trained.failures[1]) == "notforbond has no finite solution; nothing was written"
    good = forged(plugin, "good")
    for index in (0, 2):
        weights = trained.bank.weights(index)
        assert torch.equal(weights[FIRST[0]][FIRST[1]]["lora_B"], good[index].weights[FIRST[0]][FIRST[1]]["lora_B"])


def test_a_job_writes_what_single_runs_do(plugin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    words = ["--model", "tiny_sdxl", "--plugin", plugin, "--loss", "good"]
    assert main(["batch", "prompts.txt", "--output-dir", "job", *words]) == 0
    files = sorted(Path("job").glob("*.safetensors"))
    assert len(files) == 3
    assert main(["run", "--prompt", PROMPTS[0], "--output", "single.safetensors", *words]) == 0
    single = load_file("single.safetensors")
    (own,) = [file for file in files if "owl" in file.name]
    assert all(torch.allclose(value, single[name], atol=1e-6) for name, value in load_file(own).items())


def test_a_weight_is_what_is_in_the_models_file_with_a_lora_in_it_or_not(model: str, family: Family) -> None:
    encoders = list(family.encoders)
    backend, files = frozen_weights(model, encoders)
    for component, layers in target_layers(model).items():
        for layer in layers:
            weight = backend.weight(component, layer)
            if component in encoders:
                assert weight is not None
                assert torch.equal(weight, files[component, layer])
            else:
                assert weight is None


def test_a_backend_that_gives_no_weights_says_so() -> None:
    view = ModelView(ToyBackend(), BankSlot(), {"small": ["an owl"]}, [0], "cpu")
    with pytest.raises(ObjectiveError, match="loss 'good' reads the model's weights, which its backend does not give"):
        Batch(view, {"text"}, "good").weight(TargetLayer("small", "first", 4, 4))
