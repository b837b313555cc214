"""The effect that is reported, and scaling to a strength: against the model run by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_reader import open_pipeline

import lora_forge
from lora_forge.clip_unet.family import Family
from lora_forge.errors import ConfigError, RunFailed

PROMPT = "a vibrant oil painting of a steampunk owl"


@pytest.fixture(scope="module")
def plain(model: str) -> lora_forge.RunResult:
    return lora_forge.run(PROMPT, model, iterations=20)


def conditioning(pipe: Any) -> dict[str, torch.Tensor]:
    """What the pipeline itself conditions its UNet on, in the parts the family has."""
    with torch.no_grad():
        encoded = pipe.encode_prompt(
            prompt=PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    if not hasattr(pipe, "text_encoder_2"):
        return {"text_encoder last": encoded[0]}
    states, _, pooled, _ = encoded
    width = pipe.text_encoder.config.hidden_size
    return {
        "text_encoder penultimate": states[..., :width],
        "text_encoder_2 penultimate": states[..., width:],
        "text_encoder_2 pooled": pooled,
    }


def test_the_reported_shift_is_what_the_pipeline_sees_when_it_loads_the_file(
    family: Family, model: str, model_folder: Path, tmp_path: Path
) -> None:
    result = lora_forge.run(PROMPT, model, iterations=20, output=tmp_path / "owl.safetensors")
    pipe = open_pipeline(family.name, model_folder)
    before = conditioning(pipe)
    pipe.load_lora_weights(result.path)
    after = conditioning(pipe)
    assert [shift.name for shift in result.effect.shifts] == list(before)
    for shift in result.effect.shifts:
        old, new = before[shift.name].flatten().double(), after[shift.name].flatten().double()
        assert shift.relative == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-3)
        assert shift.cosine == pytest.approx(float(torch.cosine_similarity(old, new, dim=0)), abs=1e-6)
        assert shift.relative > 1e-3
    old, new = (torch.cat([part.flatten() for part in parts.values()]).double() for parts in (before, after))
    assert result.effect.conditioning_shift == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-3)


def test_component_effects_are_the_norms_of_the_products_written_out(
    plain: lora_forge.RunResult, family: Family, model_folder: Path
) -> None:
    pipe = open_pipeline(family.name, model_folder)
    assert [effect.component for effect in plain.effect.components] == list(family.components)
    for effect in plain.effect.components:
        layers = plain.weights[effect.component]
        norms = {n: float((plain.alpha / plain.rank * p["lora_B"] @ p["lora_A"]).norm()) for n, p in layers.items()}
        assert effect.layers == len(layers)
        assert effect.delta_norm == pytest.approx(sum(n**2 for n in norms.values()) ** 0.5, rel=1e-4)
        if effect.component == "unet":
            assert (effect.inert, effect.delta_norm, effect.largest_relative_change) == (len(layers), 0.0, None)
            continue
        state = {k.removeprefix("text_model."): v for k, v in getattr(pipe, effect.component).state_dict().items()}
        ratios = {n: v / float(state[f"{n.removeprefix('text_model.')}.weight"].norm()) for n, v in norms.items()}
        assert effect.largest_layer == max(ratios, key=lambda n: ratios[n])
        assert effect.largest_relative_change == pytest.approx(max(ratios.values()), rel=1e-4)
        assert effect.inert == 0


def test_strength_scales_every_layers_change(plain: lora_forge.RunResult, model: str) -> None:
    scaled = lora_forge.run(PROMPT, model, iterations=20, strength=-2.5)
    for component, layers in plain.weights.items():
        for layer, pair in layers.items():
            found = scaled.weights[component][layer]
            assert torch.equal(found["lora_A"], pair["lora_A"])
            assert torch.equal(found["lora_B"], pair["lora_B"] * -2.5)
    assert scaled.strength == -2.5
    assert scaled.loss_before == plain.loss_before
    assert scaled.loss_after > plain.loss_after


@pytest.mark.parametrize("target", [0.001, 0.05, 0.5])
def test_target_shift_moves_the_conditioning_by_what_was_asked(model: str, target: float) -> None:
    result = lora_forge.run(PROMPT, model, iterations=10, target_shift=target)
    assert result.effect.conditioning_shift == pytest.approx(target, rel=2e-3)


def test_a_shift_that_no_strength_gives_is_a_failed_run() -> None:
    with pytest.raises(RunFailed, match="no strength moves the conditioning by"):
        lora_forge.run(PROMPT, "tiny_sdxl", iterations=0, target_shift=0.1)


def test_strength_and_target_shift_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="not both"):
        lora_forge.run(PROMPT, "tiny_sdxl", strength=2.0, target_shift=0.1)


def test_the_later_of_strength_and_target_shift_wins_over_one_given_before() -> None:
    with lora_forge.load("tiny_sdxl", iterations=5, strength=3.0) as session:
        result = session.run(PROMPT, target_shift=0.05)
    assert result.effect.conditioning_shift == pytest.approx(0.05, rel=2e-3)


def test_the_loss_after_is_that_of_the_weights_in_the_file(model: str, tmp_path: Path) -> None:
    first = lora_forge.run(PROMPT, model, iterations=5, output=tmp_path / "first.safetensors")
    again = lora_forge.run(PROMPT, model, iterations=0, init_from=tmp_path / "first.safetensors")
    assert again.loss_before == pytest.approx(first.loss_after, rel=1e-6)
