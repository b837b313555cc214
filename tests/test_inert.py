"""Layers out of reach, what the file holds of them, and the zeros a format demands."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_reader import load_whole
from safetensors.torch import load_file

import lora_forge
from lora_forge.cli.main import main
from lora_forge.errors import ObjectiveError

PROMPT = "a steampunk owl"
ENCODERS = ("text_encoder", "text_encoder_2")
WIDTHS = {"text_encoder": 32, "text_encoder_2": 48}
PENULTIMATE = """
from lora_forge import LossSpec, hookimpl

def penultimate(batch):
    return -sum(out.penultimate_hidden_state.abs().mean((1, 2)) for out in batch.adapted().values())

@hookimpl
def lora_forge_losses():
    yield LossSpec(name="penultimate", summary="what the UNet reads", needs={"text"}, factory=penultimate)
"""
NOISE = """
import torch
from lora_forge import LossSpec, hookimpl

def noise(batch):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn((batch.prompts, *batch.latent_shape), generator=generator)
    timesteps = torch.full((batch.prompts,), 500)
    predicted = batch.predict_noise(latents, timesteps, batch.adapted(), adapted=True)
    frozen = batch.predict_noise(latents, timesteps, batch.frozen(), adapted=False)
    assert not frozen.requires_grad
    return (predicted - frozen - 0.1).square().mean((1, 2, 3))

@hookimpl
def lora_forge_losses():
    yield LossSpec(name="noise", summary="move the prediction", needs={"text", "noise_prediction"}, factory=noise)
"""


@pytest.fixture(scope="module")
def pipe(tiny_folder: Path) -> Any:
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(tiny_folder, dtype=torch.float32)


def plugin(folder: Path, source: str) -> Path:
    path = folder / "losses.py"
    path.write_text(source)
    return path


def model_config(path: Path, targets: dict[str, dict[str, list[int]]]) -> str:
    """A model config of these targets and their `[out, in]`."""
    data: dict[str, Any] = {"base_model": "tiny_sdxl", "lora_rank": 4, "lora_alpha": 4}
    for component, sizes in targets.items():
        data[f"target_layers_{component}"] = list(sizes)
        data[f"layer_dimensions_{component}"] = sizes
    path.write_text(json.dumps(data))
    return str(path)


def encoders_config(path: Path, *leaves: str) -> str:
    return model_config(path, {name: {leaf: [width] * 2 for leaf in leaves} for name, width in WIDTHS.items()})


def by_component(names: tuple[str, ...]) -> dict[str, int]:
    return dict(Counter(name.partition(".")[0] for name in names))


def test_a_run_says_in_plain_words_what_the_default_loss_cannot_reach(tmp_path: Path) -> None:
    result = lora_forge.run(PROMPT, "tiny_sdxl", iterations=2, output=tmp_path / "kept.safetensors")
    assert by_component(result.inert) == {"unet": 136}
    assert result.dropped == ()
    (warning,) = result.warnings
    assert "inert" in warning
    assert "unet (136 of 136 layers)" in warning

    unet = {name: tensor for name, tensor in load_file(result.path).items() if name.startswith("lora_unet")}
    assert len(unet) == 3 * 136
    assert not any(tensor.any() for name, tensor in unet.items() if name.endswith("lora_up.weight"))


@pytest.mark.parametrize("saver", ["safetensors", "diffusers"])
def test_dropping_leaves_the_layers_out_of_reach_out_of_the_file(pipe: Any, tmp_path: Path, saver: str) -> None:
    output = tmp_path / "dropped.safetensors"
    result = lora_forge.run(PROMPT, "tiny_sdxl", iterations=2, inert="drop", saver=saver, output=output)

    assert result.dropped == result.inert
    assert result.padded == ()
    assert any("left out" in warning for warning in result.warnings)
    assert not any("unet" in name for name in load_file(output))
    loaded = load_whole(pipe, output, without=["unet"])
    expected = {(c, layer) for c, layers in result.weights.items() for layer in layers if c != "unet"}
    assert loaded.keys() == expected
    assert len(result.weights["unet"]) == 136


def test_inert_layers_can_be_an_error_and_then_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "none.safetensors"
    arguments = ["run", "--prompt", PROMPT, "--model", "tiny_sdxl", "--iterations", "2", "--inert", "error"]
    assert main([*arguments, "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert "unet (136 of 136 layers)" in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_inert_layers_are_no_error_where_all_are_reached(tmp_path: Path) -> None:
    config = encoders_config(tmp_path / "encoders_config.json", "q_proj", "k_proj", "v_proj", "out_proj")
    result = lora_forge.run(PROMPT, config, iterations=2, inert="error", output=tmp_path / "all.safetensors")
    assert result.inert == result.dropped == result.padded == result.warnings == ()


@pytest.mark.parametrize("inert", ["keep", "drop", "error"])
@pytest.mark.parametrize("saver", ["safetensors", "diffusers"])
def test_an_attention_targeted_in_part_is_padded_with_zeros_and_loads_whole(
    pipe: Any, tmp_path: Path, saver: str, inert: str
) -> None:
    config = encoders_config(tmp_path / "part_config.json", "q_proj", "k_proj")
    output = tmp_path / "part.safetensors"
    result = lora_forge.run(PROMPT, config, iterations=2, alpha=10, inert=inert, saver=saver, output=output)
    loaded = load_whole(pipe, output, without=["unet"])

    padded = {
        (component, f"text_model.encoder.layers.{block}.self_attn.{leaf}")
        for component, blocks in (("text_encoder", 3), ("text_encoder_2", 4))
        for block in range(blocks)
        for leaf in ("v_proj", "out_proj")
    }
    trained = {(component, layer) for component, layers in result.weights.items() for layer in layers}
    assert len(trained) == len(padded) == 14
    assert sorted(result.padded) == sorted(f"{component}.{layer}" for component, layer in padded)
    assert result.as_dict()["padded_layers"] == list(result.padded)
    assert loaded.keys() == trained | padded
    for (component, layer), layer_loaded in loaded.items():
        if (component, layer) in padded:
            assert not layer_loaded.delta.any()
            continue
        pair = result.weights[component][layer]
        expected = 2.5 * pair["lora_B"] @ pair["lora_A"]
        assert float((layer_loaded.delta - expected).norm()) <= 1e-6 * float(expected.norm())


def test_padding_that_stands_beside_left_out_layers_is_said_in_words(tmp_path: Path) -> None:
    unet = {"down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": [64, 64]}
    config = model_config(tmp_path / "mixed_config.json", {"text_encoder": {"q_proj": [32, 32]}, "unet": unet})
    result = lora_forge.run(PROMPT, config, iterations=2, inert="drop", output=tmp_path / "mixed.safetensors")
    assert by_component(result.dropped) == {"unet": 1}
    assert len(result.padded) == 9
    assert any("9 layers of zeros" in warning for warning in result.warnings)


def test_a_loss_on_penultimate_states_leaves_the_last_layer_of_each_encoder_inert(pipe: Any, tmp_path: Path) -> None:
    output = tmp_path / "penultimate.safetensors"
    result = lora_forge.run(
        PROMPT,
        "tiny_sdxl",
        iterations=2,
        loss="penultimate",
        plugins=[plugin(tmp_path, PENULTIMATE)],
        inert="drop",
        output=output,
    )
    last = {"text_encoder": "text_model.encoder.layers.2.", "text_encoder_2": "text_model.encoder.layers.3."}
    expected = {
        f"{component}.{layer}"
        for component, layers in result.weights.items()
        for layer in layers
        if component == "unet" or layer.startswith(last[component])
    }
    assert set(result.inert) == set(result.dropped) == expected
    assert by_component(result.inert) == {"text_encoder": 4, "text_encoder_2": 4, "unet": 136}
    loaded = load_whole(pipe, output, without=["unet"])
    assert {f"{component}.{layer}" for component, layer in loaded}.isdisjoint(expected)
    assert len(loaded) == (3 + 4 - 2) * 4


def test_a_loss_on_noise_prediction_reaches_the_unet(tmp_path: Path) -> None:
    result = lora_forge.run(
        PROMPT, "tiny_sdxl", iterations=2, loss="noise", plugins=[plugin(tmp_path, NOISE)], optimizer="adamw"
    )
    assert all(pair["lora_B"].any() for pair in result.weights["unet"].values())
    # The UNet reads the penultimate state of the first encoder: its last layer is behind it. The second
    # encoder's last layer is in its pooled projection.
    assert by_component(result.inert) == {"text_encoder": 4}
    assert all(name.startswith("text_encoder.text_model.encoder.layers.2.") for name in result.inert)
    assert result.loss_after < result.loss_before


def test_a_unet_alone_can_be_trained_through_its_noise_prediction(pipe: Any, tmp_path: Path) -> None:
    unet = {
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": [64, 80],
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": [64, 64],
    }
    config = model_config(tmp_path / "unet_config.json", {"unet": unet})
    output = tmp_path / "unet.safetensors"
    result = lora_forge.run(
        PROMPT,
        config,
        iterations=3,
        loss="noise",
        plugins=[plugin(tmp_path, NOISE)],
        inert="error",
        output=output,
    )
    assert result.inert == ()
    loaded = load_whole(pipe, output, without=ENCODERS)
    assert loaded.keys() == {("unet", layer) for layer in unet}
    assert all(layer.delta.any() for layer in loaded.values())


def test_asking_for_noise_prediction_without_declaring_it_is_an_error_that_says_so(tmp_path: Path) -> None:
    undeclared = NOISE.replace('{"text", "noise_prediction"}', '{"text"}')
    with pytest.raises(lora_forge.errors.RunFailed, match="does not declare"):
        lora_forge.run(PROMPT, "tiny_sdxl", iterations=1, loss="noise", plugins=[plugin(tmp_path, undeclared)])


def test_an_objective_that_reaches_nothing_is_an_error_before_anything_is_loaded(tmp_path: Path) -> None:
    unet = {"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": [64, 64]}
    config = model_config(tmp_path / "unet_config.json", {"unet": unet})
    with pytest.raises(ObjectiveError, match="nothing would be trained"):
        lora_forge.run(PROMPT, config, iterations=1, base_model=str(tmp_path / "none"))
