"""The losses as installed: the contract, and runs on the tiny models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lora_forge_diffusion import lora_forge_losses
from lora_forge_diffusion.options import (
    AttendExciteOptions,
    CfgBakeOptions,
    ConceptEraseOptions,
    ConceptSliderOptions,
)

from lora_forge import LossSpec
from lora_forge.bank import Bank, BankSlot
from lora_forge.batch import Batch, ModelView
from lora_forge.config.model import read_model_config
from lora_forge.contracts import LoraWeights
from lora_forge.options import describe_options
from lora_forge.testing import check_loss
from lora_forge.testing.stage import adapt, open_backend, tiny_stage

SPECS: dict[str, LossSpec] = {spec.name: spec for spec in lora_forge_losses()}
SHORT: dict[str, dict[str, Any]] = {"concept_slider": {"steps": 2}, "concept_erase": {"steps": 2}}
each = pytest.mark.parametrize("name", SPECS)


@each
def test_it_keeps_the_contract_of_a_loss(name: str, check_plugin: Callable[..., None]) -> None:
    check_plugin(name, kind="loss", **SHORT.get(name, {}))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cfg_bake", CfgBakeOptions(steps=3, negative="blurry")),
        (
            "concept_slider",
            ConceptSliderOptions(
                steps=0, attributes=("man", "woman"), anchors=("", "a dog"), anchor_weight=0.5, polarity="positive"
            ),
        ),
        ("concept_erase", ConceptEraseOptions(steps=1, action="enhance", guidance=3.0, anchor_weight=1.0)),
        ("attend_excite", AttendExciteOptions(steps=0, resolution=2)),
    ],
)
def test_it_keeps_it_with_other_options(name: str, options: Any) -> None:
    check_loss(SPECS[name], options)


@each
def test_it_says_what_it_computes_and_where_that_is_from_and_what_each_option_is(name: str) -> None:
    assert SPECS[name].formula
    assert "arXiv:" in SPECS[name].source or "/" in SPECS[name].source
    assert [option.name for option in describe_options(SPECS[name].options) if not option.help] == []


@each
@pytest.mark.parametrize("model", ["tiny_sdxl", "tiny_sd15"])
def test_a_run_lowers_it_and_trains_the_unet(name: str, model: str, tiny_run: Callable[..., Any]) -> None:
    result = tiny_run("a steampunk owl", **settings(name, model, **SHORT.get(name, {})))
    assert result.loss_after < result.loss_before
    reached = [bool(pair["lora_B"].any()) for pair in result.weights["unet"].values()]
    # Behind the last map that it looks at, nothing moves one.
    assert (any if name == "attend_excite" else all)(reached)


@pytest.mark.parametrize("name", ["concept_slider", "attend_excite"])
def test_recomputed_activations_give_the_same_lora(name: str, tiny_run: Callable[..., Any]) -> None:
    plain, saving = (
        tiny_run(
            "a steampunk owl",
            **settings(name, "tiny_sd15", iterations=2, **SHORT.get(name, {})),
            backend_options={"gradient_checkpointing": saving},
        )
        for saving in (False, True)
    )
    for component, layers in plain.weights.items():
        for layer, pair in layers.items():
            for which, tensor in pair.items():
                torch.testing.assert_close(saving.weights[component][layer][which], tensor, rtol=1e-3, atol=1e-5)


def test_guidance_of_one_is_zero_at_the_start_to_rounding(tiny_run: Callable[..., Any]) -> None:
    for model in ("tiny_sdxl", "tiny_sd15"):
        result = tiny_run("a steampunk owl", **settings("cfg_bake", model, iterations=1, guidance=1.0))
        assert 0 <= result.before.terms["cfg_bake"] < 1e-11
        assert tiny_run("a steampunk owl", **settings("cfg_bake", model, iterations=1)).before.terms["cfg_bake"] > 1e-3


def test_a_slider_pulls_towards_positive_at_the_scale_1_and_towards_negative_at_the_scale_minus_1(
    tiny_run: Callable[..., Any],
) -> None:
    ends = {"positive": "a castle", "negative": "a fish"}
    result = tiny_run("a steampunk owl", **settings("concept_slider", "tiny_sd15", iterations=25, steps=1, **ends))
    batch = batch_of(result.weights, "tiny_sd15")
    latents, at = batch.randn("latents", *batch.latent_shape), torch.tensor([999])

    def predicted(text: str, *, adapted: bool) -> torch.Tensor:
        with torch.no_grad():
            return batch.predict_noise(latents, at, batch.encode(text, adapted=adapted), adapted=adapted).flatten()

    frozen = predicted("{prompt}", adapted=False)
    direction = predicted("a castle", adapted=False) - predicted("a fish", adapted=False)
    moved = predicted("{prompt}", adapted=True) - frozen
    with batch.negated():
        moved_back = predicted("{prompt}", adapted=True) - frozen
    assert torch.cosine_similarity(moved, direction, dim=0) > 0.2
    assert torch.cosine_similarity(moved_back, direction, dim=0) < -0.2


def settings(name: str, model: str, *, iterations: int = 6, **options: Any) -> dict[str, Any]:
    """A short run with large steps."""
    loss = {"name": name, "options": options}
    return {
        "loss": loss,
        "model": model,
        "optimizer": {"name": "adamw", "options": {"lr": 0.003}},
        "iterations": iterations,
    }


def batch_of(weights: LoraWeights, model: str) -> Batch:
    """A batch of the one prompt on a model with this LoRA in it."""
    stage = tiny_stage(model)
    backend = open_backend(stage.spec, stage.spec.options())
    backend.load(stage.spec.components)
    rank = next(iter(weights["unet"].values()))["lora_A"].shape[0]
    slot = BankSlot()
    adapt(backend, stage.layers, slot)
    slot.bank = Bank(stage.layers, rank=rank, alpha=read_model_config(model).lora_alpha, prompts=1)
    slot.bank.fill(
        {
            component: {layer: {k: t[None] for k, t in pair.items()} for layer, pair in layers.items()}
            for component, layers in weights.items()
        }
    )
    view = ModelView(backend, slot, {one: ["a steampunk owl"] for one in stage.spec.encoders}, [1], "cpu")
    view.begin_evaluation()
    return Batch(view, {"text", "noise_prediction"}, "a_loss")
