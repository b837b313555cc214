"""The objective's first gradient, as initializers are given it, against autograd on the frozen weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers_reader import open_pipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_forge
from lora_forge.bank import Bank, BankLinear, BankSlot, inject
from lora_forge.batch import ModelView
from lora_forge.clip_unet.family import Family
from lora_forge.clock import Clock
from lora_forge.config.model import shipped_folder
from lora_forge.config.run import read_run_config
from lora_forge.contracts import LayerGradient, LayerKey, LoraWeights, TargetLayer
from lora_forge.errors import ObjectiveError, RunFailed
from lora_forge.model import open_model
from lora_forge.plan import Request, make_plan
from lora_forge.plugins import Registry, discover
from lora_forge.runner import forge
from lora_forge.training.first_gradient import RecordingBank, first_gradients
from lora_forge.training.objective import Objective
from lora_forge.training.train import set_up

PROMPTS = ("a steampunk owl", "bond", "a squirrel in a forest, in the rain")

LOSSES = """
import torch
from lora_forge import InitializerSpec, LossSpec, hookimpl

def content(batch):
    total = torch.zeros(batch.prompts)
    adapted, other = batch.adapted(masked=True), batch.encode("a blurry {prompt}", adapted=True)
    for encoder, tokens in batch.tokens.items():
        own = tokens.attention_mask[..., None]
        total = total - (adapted[encoder].last_hidden_state.abs() * own).sum(dim=(1, 2)) / own.sum(dim=(1, 2))
        total = total + other[encoder].pooled.square().mean(dim=1)
    return total

def denoised(batch):
    latents, timesteps = batch.randn("latents", *batch.latent_shape), torch.full((batch.prompts,), 500)
    predicted = batch.predict_noise(latents, timesteps, batch.adapted(), adapted=True)
    again = batch.predict_noise(latents, timesteps // 2, batch.encode("fog", adapted=True), adapted=True)
    return (predicted - again).square().mean((1, 2, 3)) + predicted.square().mean((1, 2, 3))

class Counts:
    def __init__(self):
        self.calls = 0

    def __call__(self, batch):
        self.calls += 1
        noise = batch.randn("noise", 1)[:, 0]
        return self.calls + noise + sum(one.pooled.sum(1) for one in batch.adapted().values()) * 1e-4

def broken_for_bond(batch):
    (texts, *_) = batch.texts.values()
    factors = torch.tensor([float("nan") if text == "bond" else 1.0 for text in texts])
    return factors * sum(one.pooled.sum(1) for one in batch.adapted().values())

def both_ways(batch):
    # At the start the model is the frozen one at either scale, and ΔW moves the two apart.
    plain = sum(one.pooled.sum(1) for one in batch.adapted().values())
    with batch.negated():
        opposite = sum(one.pooled.sum(1) for one in batch.adapted().values())
    return (plain - opposite) / 2

def plainly(batch):
    return sum(one.pooled.sum(1) for one in batch.adapted().values())

def detached(batch):
    return sum(one.pooled.sum(1) for one in batch.frozen().values())

def large(layer):
    return torch.randn(layer.rank, layer.in_features), torch.randn(layer.out_features, layer.rank)

@hookimpl
def lora_forge_initializers():
    yield InitializerSpec(name="large", summary="a change from the start", factory=large, gradient=True)

@hookimpl
def lora_forge_losses():
    yield LossSpec(name="content", summary="", factory=content, tokens="content")
    yield LossSpec(name="denoised", summary="", factory=denoised, needs={"text", "noise_prediction"})
    yield LossSpec(name="counts", summary="", factory=Counts)
    yield LossSpec(name="broken_for_bond", summary="", factory=broken_for_bond)
    yield LossSpec(name="detached", summary="", factory=detached)
    yield LossSpec(name="both_ways", summary="", factory=both_ways)
    yield LossSpec(name="plainly", summary="", factory=plainly)
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugin") / "first_gradient_losses.py"
    path.write_text(LOSSES)
    return path


@pytest.fixture(scope="module")
def registry(plugin: Path) -> Registry:
    return discover([plugin])


@pytest.fixture(scope="module")
def pipe(family: Family, model_folder: Path) -> Any:
    return open_pipeline(family.name, model_folder)


@contextmanager
def opened(
    pipe: Any, registry: Registry, model: str | Path, prompts: Sequence[str] = PROMPTS, **config: Any
) -> Iterator[tuple[Bank, ModelView, Objective]]:
    """What a run with these prompts starts from, on a model in memory."""
    settings = {"prompt": prompts[0], "model": str(model), **config}
    plan = make_plan(read_run_config([settings]), registry, in_memory=True)
    whole = open_model(plan, pipeline=pipe)
    try:
        with whole.use(plan, Clock()):
            yield set_up(plan, [Request(prompt, None, seed, None) for seed, prompt in enumerate(prompts)], whole)
    finally:
        whole.close()


def by_autograd(pipe: Any, bank: Bank, view: ModelView, objective: Objective) -> dict[LayerKey, list[torch.Tensor]]:
    """Each prompt's gradient with respect to every frozen weight, `(out, in)`, the model being adapted by `bank`."""
    parts = [module for module in pipe.components.values() if isinstance(module, nn.Module)]
    layers = [layer for part in parts for layer in part.modules() if isinstance(layer, BankLinear)]
    weights: list[Any] = [layer.get_base_layer().weight for layer in layers]
    for weight in weights:
        weight.requires_grad_()
    view.slot.bank = bank
    view.begin_step()
    total = objective.total(objective.values())
    rows = [torch.autograd.grad(one, weights, retain_graph=True, allow_unused=True) for one in total]
    view.slot.bank = None
    for weight in weights:
        weight.requires_grad_(False)
    return {layer.key: list(own) for layer, *own in zip(layers, *rows, strict=True) if own[0] is not None}


def matrix(gradient: LayerGradient | None) -> torch.Tensor:
    assert gradient is not None
    return gradient.matrix()


def assert_close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert float((one - other).norm()) <= tolerance * float(other.norm())


@pytest.mark.parametrize("loss", [["embedding_magnitude"], ["content"], ["denoised"], ["content", "denoised"]])
def test_it_is_autograds_of_each_prompts_objective_with_respect_to_the_frozen_weight(
    pipe: Any, registry: Registry, model: str, loss: list[str]
) -> None:
    with opened(pipe, registry, model, loss=loss) as (bank, view, objective):
        found = first_gradients(bank, {}, view, objective)
        nothing = Bank(list(bank.layers.values()), rank=bank.rank, alpha=bank.alpha, prompts=bank.prompts)
        view.begin_evaluation()
        view.step = 0
        expected = by_autograd(pipe, nothing, view, objective)
    assert found.keys() == expected.keys()
    assert any(component == "unet" for component, _ in found) == ("denoised" in loss)
    for key, gradients in found.items():
        for own, theirs in zip(gradients, expected[key], strict=True):
            assert_close(matrix(own), theirs)


def test_layers_of_an_earlier_file_carry_its_change_while_the_others_are_asked_about(
    pipe: Any, registry: Registry, model: str
) -> None:
    with opened(pipe, registry, model, loss=["content"]) as (bank, view, objective):
        start = Bank(list(bank.layers.values()), rank=bank.rank, alpha=bank.alpha, prompts=bank.prompts)
        earlier: LoraWeights = {}
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for (component, layer), pair in list(start.pairs.items())[::3]:
                placed = {
                    name: 0.3 * torch.randn(value.shape[1:], generator=generator)
                    for name, value in pair._asdict().items()
                }
                earlier.setdefault(component, {})[layer] = placed
                pair.lora_A.copy_(placed["lora_A"])
                pair.lora_B.copy_(placed["lora_B"])
        without, found = (first_gradients(bank, one, view, objective) for one in ({}, earlier))
        expected = by_autograd(pipe, start, view, objective)
    for key, (own, *_) in found.items():
        assert_close(matrix(own), expected[key][0])
    changed = [key for key, (own, *_) in found.items() if not torch.equal(matrix(own), matrix(without[key][0]))]
    assert len(changed) > len(found) / 2


def test_blocks_below_the_adapted_ones_that_run_once_make_no_difference(
    pipe: Any, registry: Registry, model: str, tmp_path: Path
) -> None:
    config = json.loads((shipped_folder() / f"{model}_config.json").read_text(encoding="utf-8"))
    for key in [key for key in config if "text_encoder" in key]:
        values = config[key]
        last = max(int(name.split(".")[3]) for name in values)
        kept = [name for name in values if int(name.split(".")[3]) == last]
        config[key] = kept if isinstance(values, list) else {name: values[name] for name in kept}
    upper = tmp_path / "upper_config.json"
    upper.write_text(json.dumps(config), encoding="utf-8")
    with opened(pipe, registry, upper, loss=["content"]) as (bank, view, objective):
        found = [first_gradients(bank, {}, view, objective) for _ in range(2)]
    with opened(pipe, registry, model, loss=["content"]) as (bank, view, objective):
        everywhere = first_gradients(bank, {}, view, objective)
    for gradients in found:
        assert 0 < len(gradients) < len(everywhere)
        for key, (own, *_) in gradients.items():
            assert_close(matrix(own), matrix(everywhere[key][0]))


def test_it_is_the_same_to_the_bit_where_the_unets_activations_are_computed_again(
    pipe: Any, registry: Registry, model: str
) -> None:
    found = []
    for again in (False, True):
        options = {"gradient_checkpointing": again}
        with opened(pipe, registry, model, loss=["denoised"], backend_options=options) as (bank, view, objective):
            found.append(first_gradients(bank, {}, view, objective))
    assert found[0].keys() == found[1].keys()
    for key, gradients in found[0].items():
        for own, theirs in zip(gradients, found[1][key], strict=True):
            assert torch.equal(matrix(own), matrix(theirs))


class Twice(nn.Module):
    """A layer that is used twice, the second time on what the other made of the first, each block as `block` says."""

    def __init__(self, block: Callable[..., Any]) -> None:
        super().__init__()
        self.first, self.second, self.block = nn.Linear(7, 5), nn.Linear(5, 7), block

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        hidden = self.block(self._forward, rows)
        return torch.tanh(self.block(self._forward, hidden))

    def _forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.second(torch.relu_(self.first(rows)) * 2))


def straight(function: Callable[..., torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    return function(rows)


def checkpointed(function: Callable[..., torch.Tensor], rows: torch.Tensor) -> Any:
    return checkpoint(function, rows, use_reentrant=False)


def checkpointed_reentrant(function: Callable[..., torch.Tensor], rows: torch.Tensor) -> Any:
    return checkpoint(function, rows, use_reentrant=True)


LAYERS = [TargetLayer("part", "first", 5, 7), TargetLayer("part", "second", 7, 5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", [straight, checkpointed, checkpointed_reentrant])
def test_uses_of_a_layer_are_added_up_and_activations_may_be_computed_again(
    block: Callable[..., Any], dtype: torch.dtype
) -> None:
    prompts = 3
    torch.manual_seed(0)
    model, plain, slot = Twice(block).to(dtype), Twice(straight).to(dtype), BankSlot()
    plain.load_state_dict(model.state_dict())
    model.requires_grad_(False)
    inject(model, {layer.name: layer.key for layer in LAYERS}, 2, 3.0, slot)
    slot.bank = bank = RecordingBank(Bank(LAYERS, rank=2, alpha=3.0, prompts=prompts))
    rows = torch.randn(prompts, 4, 7, dtype=dtype)
    model(rows.clone().requires_grad_()).square().sum().backward()
    for key, gradients in bank.gradients().items():
        for prompt, own in enumerate(gradients):
            assert own is not None
            assert own.outputs.dtype == own.inputs.dtype == torch.float32
            assert own.outputs.shape[0] == own.inputs.shape[0] == 2 * 4
            plain.zero_grad()
            plain(rows[prompt]).square().sum().backward()
            expected: Any = plain.get_submodule(key[1]).weight
            torch.testing.assert_close(matrix(own), expected.grad.float(), rtol=1e-4, atol=1e-5)
    assert set(bank.gradients()) == {layer.key for layer in LAYERS}


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 20), out=st.integers(1, 12), into=st.integers(1, 12), seed=st.integers(0, 2**20))
def test_its_decomposition_is_numpys_of_the_whole_matrix_with_the_largest_number_of_each_direction_positive(
    rows: int, out: int, into: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradient = LayerGradient(torch.randn(rows, out, generator=generator), torch.randn(rows, into, generator=generator))
    u, sigma, vt = gradient.svd()
    whole = gradient.outputs.numpy().astype(np.float64).T @ gradient.inputs.numpy().astype(np.float64)
    _, expected, directions = np.linalg.svd(whole, full_matrices=False)
    k = min(rows, out, into)
    assert (u.shape, sigma.shape, vt.shape) == ((out, k), (k,), (k, into))
    scale = float(expected[0])
    np.testing.assert_allclose(sigma.numpy(), expected[:k], atol=1e-5 * scale)
    np.testing.assert_allclose(expected[k:], 0, atol=1e-9 * scale)
    np.testing.assert_allclose((u * sigma) @ vt, whole, atol=2e-5 * scale)
    torch.testing.assert_close(vt @ vt.T, torch.eye(k), rtol=0, atol=1e-5)
    for index in range(k):
        gaps = np.abs(expected[index] - np.delete(expected[: k + 1] if k < len(expected) else expected, index))
        assert vt[index][vt[index].abs().argmax()] > 0
        if len(gaps) == 0 or gaps.min() > 0.05 * scale:
            assert abs(float(directions[index] @ vt[index].numpy().astype(np.float64))) == pytest.approx(1, abs=1e-6)


def test_steps_are_those_of_a_run_that_never_asked(plugin: Path, model: str) -> None:
    """Neither a loss that counts its calls, nor the noise it draws, can tell."""
    without, asked = (
        lora_forge.run("an owl", model, iterations=3, loss="counts", initializer=name, plugins=[plugin])
        for name in ("gaussian", "gradient")
    )
    assert [step.terms["counts"] for step in without.steps][:1] == [step.terms["counts"] for step in asked.steps][:1]
    assert [round(step.terms["counts"], 1) for step in without.steps] == [
        round(step.terms["counts"], 1) for step in asked.steps
    ]


def test_it_is_asked_of_the_frozen_model_whatever_the_initializer_starts_with(
    pipe: Any, registry: Registry, model: str
) -> None:
    """`large` starts as a change; the gradient it is given, and the bank it fills, do not have that in it yet."""
    with opened(pipe, registry, model, loss=["content"], initializer="large") as (bank, view, objective):
        assert all(bool(pair.lora_B.any()) for pair in bank.pairs.values())
        assert not bank.gradient.any()
        found = first_gradients(bank, {}, view, objective)
    with opened(pipe, registry, model, loss=["content"]) as (bank, view, objective):
        expected = first_gradients(bank, {}, view, objective)
    for key, (own, *_) in found.items():
        assert torch.equal(matrix(own), matrix(expected[key][0]))


def test_a_prompt_whose_objective_is_nan_fails_for_that_and_has_no_gradient(
    pipe: Any, registry: Registry, model: str
) -> None:
    with opened(pipe, registry, model, loss=["broken_for_bond"]) as (bank, view, objective):
        found = first_gradients(bank, {}, view, objective)
    assert {tuple(own is None for own in gradients) for gradients in found.values()} == {(False, True, False)}
    config = {"prompt": "bond", "model": model, "loss": "broken_for_bond", "initializer": "gradient"}
    plan = make_plan(read_run_config([config]), registry)
    with pytest.raises(RunFailed, match="broken_for_bond became NaN at step 1"):
        forge(plan, [Request("bond", None, 0, None)], open_model(plan), registry, Clock())


def test_an_objective_that_nothing_depends_on_ends_with_the_same_words(plugin: Path) -> None:
    for initializer in ("gaussian", "gradient"):
        with pytest.raises(ObjectiveError, match="depends on no trainable layer"):
            lora_forge.run("owl", "tiny_sd15", loss="detached", initializer=initializer, plugins=[plugin])


def test_what_a_loss_sees_of_the_negated_lora_counts_the_other_way_round(
    pipe: Any, registry: Registry, model: str
) -> None:
    matrices = []
    for loss in ("plainly", "both_ways"):
        with opened(pipe, registry, model, PROMPTS[:1], loss=loss) as (bank, view, objective):
            (gradients,) = zip(*first_gradients(bank, {}, view, objective).values(), strict=True)
            matrices.append([one.matrix() for one in gradients if one is not None])
    assert matrices[0]
    for plain, both in zip(*matrices, strict=True):
        assert float((plain - both).norm()) <= 1e-4 * float(plain.norm())
