"""The built-in initializers: what each makes of a layer, and `gradient` in whole runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

import lora_forge
from lora_forge.builtin.initializers import GainOptions, gradient, kaiming, orthogonal
from lora_forge.cli.main import main
from lora_forge.clock import Clock
from lora_forge.config.run import read_run_config
from lora_forge.contracts import InitialLayer, LayerGradient
from lora_forge.model import open_model
from lora_forge.plan import Request, make_plan
from lora_forge.plugins import discover
from lora_forge.result import RunResult
from lora_forge.runner import forge
from lora_forge.seeds import layer_generator

PROMPTS = ("a steampunk owl", "bond", "a squirrel in a forest")


def a_layer(rank: int, out: int, into: int, seed: int, own: LayerGradient | None = None) -> InitialLayer:
    return InitialLayer("unet", "it", out, into, rank, layer_generator(seed, "unet", "it"), own)


def a_gradient(rows: int, out: int, into: int, seed: int) -> LayerGradient:
    generator = torch.Generator().manual_seed(seed)
    return LayerGradient(torch.randn(rows, out, generator=generator), torch.randn(rows, into, generator=generator))


def test_kaiming_is_what_pefts_own_layer_starts_with() -> None:
    layer = a_layer(3, 5, 7, seed=1)
    oracle: Any = get_peft_model(nn.Sequential(nn.Linear(7, 5)), LoraConfig(r=3, target_modules=["0"]))
    theirs = oracle.base_model.model[0]
    with torch.random.fork_rng():
        torch.manual_seed(layer.generator.initial_seed())
        theirs.reset_lora_parameters("default", True)
    lora_a, lora_b = kaiming(layer)
    assert torch.equal(lora_a, theirs.lora_A["default"].weight)
    assert torch.equal(lora_b, theirs.lora_B["default"].weight)
    assert 0.5 / math.sqrt(7) < float(lora_a.abs().max()) <= 1 / math.sqrt(7)


@settings(deadline=None, max_examples=40)
@given(rank=st.integers(1, 12), into=st.integers(1, 12), gain=st.floats(0.01, 10), seed=st.integers(0, 2**20))
def test_rows_of_orthogonal_are_as_long_as_the_gain_and_at_right_angles_or_else_its_columns_are(
    rank: int, into: int, gain: float, seed: int
) -> None:
    lora_a, lora_b = orthogonal(a_layer(rank, 5, into, seed), GainOptions(gain))
    square = lora_a @ lora_a.T if rank <= into else lora_a.T @ lora_a
    torch.testing.assert_close(square / gain**2, torch.eye(min(rank, into)), rtol=0, atol=1e-5)
    assert torch.equal(lora_b, torch.zeros(5, rank))


@settings(deadline=None, max_examples=60)
@given(
    rank=st.integers(1, 8),
    rows=st.integers(1, 8),
    out=st.integers(1, 9),
    into=st.integers(1, 9),
    seed=st.integers(0, 2**20),
)
def test_rows_of_gradient_are_its_first_singular_vectors_and_where_it_has_no_more_random_ones_as_long(
    rank: int, rows: int, out: int, into: int, seed: int
) -> None:
    own = a_gradient(rows, out, into, seed)
    lora_a, lora_b = gradient(a_layer(rank, out, into, seed, own), GainOptions(0.5))
    random, _ = gradient(a_layer(rank, out, into, seed), GainOptions(0.5))
    torch.testing.assert_close(lora_a.norm(dim=1), torch.full((rank,), 0.5))
    torch.testing.assert_close(random.norm(dim=1), torch.full((rank,), 0.5))
    matrix = own.matrix().double().numpy()
    sigma = np.linalg.svd(matrix, compute_uv=False)
    known = min(rank, int((sigma > 1e-4 * sigma[0]).sum()))
    # ‖G a‖ of a unit singular vector is its singular value.
    stretched = np.linalg.norm(lora_a[:known].double().numpy() @ matrix.T, axis=1) / 0.5
    np.testing.assert_allclose(stretched, sigma[:known], atol=1e-4 * sigma[0])
    certain = min(rank, int((sigma > 1e-6 * sigma[0]).sum()))
    assert torch.equal(lora_a[certain:], random[certain:])
    assert torch.equal(lora_b, torch.zeros(out, rank))


def test_a_gradient_of_zero_is_as_none() -> None:
    some = a_gradient(4, 5, 7, seed=0)
    nothing = LayerGradient(torch.zeros_like(some.outputs), some.inputs)
    given, without = (gradient(a_layer(3, 5, 7, 0, one), GainOptions())[0] for one in (nothing, None))
    assert torch.equal(given, without)


def forge_together(prompts: Sequence[str], model: str, **config: Any) -> list[RunResult]:
    registry = discover()
    plan = make_plan(
        read_run_config([{"prompt": prompts[0], "model": model, "initializer": "gradient", **config}]), registry
    )
    requests = [Request(prompt, None, seed, None) for seed, prompt in enumerate(prompts)]
    return forge(plan, requests, open_model(plan), registry, Clock())


def test_three_prompts_together_start_and_end_where_each_does_alone(model: str) -> None:
    for iterations in (0, 5):
        together = forge_together(PROMPTS, model, iterations=iterations)
        registry = discover()
        for seed, prompt in enumerate(PROMPTS):
            config = {"prompt": prompt, "model": model, "initializer": "gradient", "iterations": iterations}
            plan = make_plan(read_run_config([config]), registry)
            (alone,) = forge(plan, [Request(prompt, None, seed, None)], open_model(plan), registry, Clock())
            for component, layers in alone.weights.items():
                for layer, pair in layers.items():
                    for name, expected in pair.items():
                        difference = float((together[seed].weights[component][layer][name] - expected).norm())
                        assert difference <= 1e-3 * float(expected.norm()), (component, layer, name)


def test_a_run_starts_along_the_gradient_where_that_reaches_and_anywhere_else_at_random(model: str) -> None:
    one, same, other = (
        lora_forge.run(prompt, model, iterations=0, initializer={"name": "gradient", "options": {"gain": 2.0}})
        for prompt in ("an owl", "an owl", "two boats")
    )
    for component, layers in one.weights.items():
        for layer, pair in layers.items():
            torch.testing.assert_close(pair["lora_A"].norm(dim=1), torch.full((len(pair["lora_A"]),), 2.0))
            assert not pair["lora_B"].any()
            assert torch.equal(pair["lora_A"], same.weights[component][layer]["lora_A"])
            alike = torch.equal(pair["lora_A"], other.weights[component][layer]["lora_A"])
            assert alike == (component == "unet"), "the default objective does not reach the UNet"


def test_layers_of_an_earlier_file_stay_what_they_are(model: str, tmp_path: Path) -> None:
    earlier = tmp_path / "earlier.safetensors"
    trained = lora_forge.run("an owl", model, iterations=3, inert="drop", output=earlier)
    settings = {"init_from": earlier, "initializer": "gradient", "iterations": 0}
    result = lora_forge.run("two boats", model, **settings)
    for component, layers in trained.weights.items():
        for layer, pair in layers.items():
            for name, value in pair.items():
                if component != "unet":
                    assert torch.equal(result.weights[component][layer][name], value)
    for pair in result.weights["unet"].values():
        torch.testing.assert_close(pair["lora_A"].norm(dim=1), torch.full((len(pair["lora_A"]),), 0.3))


@pytest.mark.parametrize("name", ["kaiming", "orthogonal", "gradient"])
def test_each_is_run_by_its_name(name: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "it.safetensors"
    arguments = ["run", "--prompt", "an owl", "--model", model, "--iterations", "5", "--initializer", name]
    assert main([*arguments, "--output", str(output)]) == 0
    assert output.is_file()
    capsys.readouterr()
