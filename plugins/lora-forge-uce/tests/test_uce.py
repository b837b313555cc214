"""The closed form, against its normal equations, and as a run gives it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from by_hand import ByHand
from lora_forge_uce import lora_forge_losses
from lora_forge_uce.options import NEUTRAL, Options

import lora_forge
from lora_forge import RunResult
from lora_forge.builtin.sd15.family import SD15
from lora_forge.builtin.sdxl.family import SDXL
from lora_forge.clip_unet.tiny import tiny_folder
from lora_forge.clock import Clock
from lora_forge.config.model import shipped_folder
from lora_forge.config.run import read_run_config
from lora_forge.errors import ObjectiveError
from lora_forge.model import open_model
from lora_forge.options import describe_options
from lora_forge.plan import Request, make_plan
from lora_forge.plugins import discover
from lora_forge.runner import forge
from lora_forge.testing import check_loss

PROMPT = "a steampunk owl"
PROMPTS = (PROMPT, "bond", "a squirrel in a forest")
FAMILIES = {"tiny_sdxl": SDXL, "tiny_sd15": SD15}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pipe(model: str) -> Any:
    return load(model)


@pytest.fixture
def unet_only(model: str, tmp_path: Path) -> str:
    """A model config whose target layers are the UNet's alone, so that the rank may be what the layers allow."""
    config = json.loads((shipped_folder() / f"{model}_config.json").read_text())
    for key in config:
        if key.startswith("target_layers_text"):
            config[key] = []
    path = tmp_path / "unet_only_config.json"
    path.write_text(json.dumps(config))
    return str(path)


def load(model: str) -> Any:
    family = FAMILIES[model]
    pipe = getattr(diffusers, family.pipeline).from_pretrained(
        tiny_folder(family), safety_checker=None, dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(model: str, rank: int = 4, prompt: str = PROMPT, **options: Any) -> RunResult:
    return lora_forge.run(prompt, model, rank=rank, loss={"name": "uce", "options": options})


def by_hand(pipe: Any, **options: Any) -> ByHand:
    chosen = Options(**options)
    target = chosen.target.replace("{prompt}", PROMPT)
    return ByHand(pipe, PROMPT, target, chosen.preserve, chosen.preserve_weight, chosen.ridge)


def deltas(result: RunResult) -> dict[str, torch.Tensor]:
    """ΔW of the UNet's layers that are not zero, float64."""
    scale = result.alpha / result.rank
    made = {
        name: scale * pair["lora_B"].double() @ pair["lora_A"].double() for name, pair in result.weights["unet"].items()
    }
    return {name: delta for name, delta in made.items() if bool(delta.any())}


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(
    "options",
    [{}, {"target": "a castle", "preserve": ("a dog, a cat",), "preserve_weight": 0.1, "ridge": 1.0}],
    ids=["defaults", "others"],
)
def test_with_all_the_rank_that_a_layer_has_it_solves_the_normal_equations(
    unet_only: str, pipe: Any, options: dict[str, Any]
) -> None:
    rank = min(min(weight.shape) for weight in by_hand(pipe).layers().values())
    result, expected = run(unet_only, rank, **options), by_hand(pipe, **options)
    found = deltas(result)
    assert set(found) == set(expected.layers())
    after = []
    for name, weight in expected.layers().items():
        best = expected.best(weight) - weight
        if rank >= min(weight.shape):
            assert relative(found[name], best) < 2e-4
        after.append(expected.value(weight, expected.truncated(best, rank)[0]))
    assert result.after.terms["uce"] == pytest.approx(sum(after) / len(after), rel=1e-4)


@pytest.mark.parametrize("rank", [1, 4])
def test_cut_off_at_a_rank_it_is_the_nearest_in_the_metric_of_the_objective_and_loses_what_it_says(
    model: str, pipe: Any, rank: int
) -> None:
    result, expected = run(model, rank), by_hand(pipe)
    found, whole, lost, before = deltas(result), 0.0, 0.0, 0.0
    for name, weight in expected.layers().items():
        best = expected.best(weight) - weight
        truncated, own = expected.truncated(best, rank)
        assert relative(found[name], truncated) < 1e-3
        # Not what the largest singular values of ΔW alone would give.
        u, s, vh = torch.linalg.svd(best)
        plain = u[:, :rank] * s[:rank] @ vh[:rank]
        assert expected.value(weight, truncated) < expected.value(weight, plain)
        before += expected.value(weight, torch.zeros_like(weight))
        whole, lost = whole + expected.value(weight, best), lost + own
    count = len(found)
    assert result.before.terms["uce"] == pytest.approx(before / count, rel=1e-4)
    assert result.after.terms["uce"] == pytest.approx((whole + lost) / count, rel=1e-4)
    assert lost > 0.01 * whole


def test_with_the_saved_lora_a_pipeline_has_keys_and_values_near_the_targets(model: str, tmp_path: Path) -> None:
    path = tmp_path / "owl.safetensors"
    loss = {"name": "uce", "options": {"preserve_weight": 0.0, "ridge": 1e-4}}
    lora_forge.run(PROMPT, model, rank=16, loss=loss, output=path)
    pipe = load(model)
    hand = by_hand(pipe)
    source, target = hand.states(PROMPT).float(), hand.states(f"{PROMPT}, masterpiece, best quality").float()
    names = list(hand.layers())
    with torch.no_grad():
        wanted = {name: pipe.unet.get_submodule(name)(target) for name in names}
        before = {name: pipe.unet.get_submodule(name)(source) for name in names}
        pipe.load_lora_weights(path)
        after = {name: pipe.unet.get_submodule(name)(source) for name in names}
    for name in names:
        assert relative(after[name], wanted[name]) < 0.5 * relative(before[name], wanted[name])


def test_a_prompt_that_is_its_own_target_is_not_changed(model: str) -> None:
    result = run(model, target="{prompt}")
    assert deltas(result) == {}
    assert result.before.terms["uce"] == result.after.terms["uce"] == 0


def test_no_layer_but_the_cross_attentions_keys_and_values_is_changed(model: str, pipe: Any) -> None:
    result = run(model)
    assert set(deltas(result)) == set(by_hand(pipe).layers())
    assert not any(pair["lora_B"].any() for pair in result.weights["text_encoder"].values())
    assert result.steps == ()


@pytest.mark.parametrize("ridge", [0.001, 1.0])
@pytest.mark.parametrize("preserve_weight", [0.0, 10.0])
def test_the_value_is_never_higher_after_and_a_stronger_hold_moves_less(ridge: float, preserve_weight: float) -> None:
    result = run("tiny_sdxl", ridge=ridge, preserve_weight=preserve_weight)
    assert result.after.terms["uce"] <= result.before.terms["uce"]
    stronger = run("tiny_sdxl", ridge=10 * ridge, preserve_weight=preserve_weight)
    sizes = [sum(float(delta.norm()) for delta in deltas(one).values()) for one in (result, stronger)]
    assert sizes[1] < sizes[0]


def test_prompts_that_are_preserved_keep_their_keys_better_than_without(pipe: Any, model: str) -> None:
    kept, free = (run(model, preserve_weight=weight) for weight in (10.0, 0.0))
    hand = by_hand(pipe)
    for text in NEUTRAL:
        states = hand.states(text)
        moved = [
            sum(float((states @ delta.T).square().sum()) for delta in deltas(result).values())
            for result in (kept, free)
        ]
        assert moved[0] < 0.5 * moved[1]


def test_prompts_together_come_out_as_each_does_alone() -> None:
    registry = discover()
    plan = make_plan(read_run_config([{"prompt": PROMPT, "model": "tiny_sdxl", "loss": "uce"}]), registry)
    requests = [Request(prompt, None, seed, None) for seed, prompt in enumerate(PROMPTS)]
    for prompt, result in zip(PROMPTS, forge(plan, requests, open_model(plan), registry, Clock()), strict=True):
        alone = run("tiny_sdxl", prompt=prompt)
        assert result.after.terms["uce"] == pytest.approx(alone.after.terms["uce"], rel=1e-4)
        own, others = deltas(result), deltas(alone)
        assert all(relative(own[name], others[name]) < 1e-3 for name in own)


def test_beside_another_loss_it_is_trained(model: str) -> None:
    loss = [{"name": "uce"}, {"name": "embedding_magnitude", "weight": 0.1}]
    optimizer = {"name": "adamw", "options": {"lr": 0.01}}
    result = lora_forge.run(PROMPT, model, loss=loss, optimizer=optimizer, iterations=10)
    assert len(result.steps) == 10
    assert result.after.terms["uce"] < 0.9 * result.before.terms["uce"]
    assert run(model).after.terms["uce"] < result.after.terms["uce"]


def test_target_layers_without_cross_attention_are_refused(tmp_path: Path) -> None:
    config = json.loads((shipped_folder() / "tiny_sdxl_config.json").read_text())
    config["target_layers_unet"] = [name for name in config["target_layers_unet"] if "attn2" not in name]
    path = tmp_path / "self_config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(ObjectiveError, match=r"uce edits attn2\.to_k and attn2\.to_v of the UNet, and none of them"):
        run(str(path))


@pytest.mark.parametrize("options", [Options(), Options(target="a castle", preserve=("a dog",), ridge=0.1)])
def test_it_keeps_the_contract_of_a_loss(options: Options) -> None:
    (spec,) = lora_forge_losses()
    check_loss(spec, options)


def test_it_keeps_it_installed_under_its_name(check_plugin: Callable[..., Any]) -> None:
    check_plugin("uce", kind="loss")


def test_each_option_says_what_it_is() -> None:
    assert all(option.help for option in describe_options(Options))
