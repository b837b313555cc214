"""Layers out of reach, what the file holds of them, and the zeros a format demands."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from diffusers_reader import load_whole, open_pipeline
from safetensors.torch import load_file
from tiny_models import encoder_blocks, target_layers

import lora_forge
from lora_forge.cli.main import main
from lora_forge.clip_unet.family import Family
from lora_forge.errors import ObjectiveError

PROMPT = "a steampunk owl"
PENULTIMATE = """
from lora_forge import LossSpec, hookimpl

def penultimate(batch):
    return -sum(out.penultimate_hidden_state.abs().mean((1, 2)) for out in batch.adapted().values())

@hookimpl
def lora_forge_losses():
    yield LossSpec(name="penultimate", summary="the input of the last block", needs={"text"}, factory=penultimate)
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
def pipe(family: Family, model_folder: Path) -> Any:
    return open_pipeline(family.name, model_folder)


@pytest.fixture(scope="module")
def unet_layers(model: str) -> int:
    """How many target layers the UNet has."""
    return len(target_layers(model)["unet"])


def plugin(folder: Path, source: str) -> Path:
    path = folder / "losses.py"
    path.write_text(source)
    return path


def model_config(path: Path, model: str, *targets: str) -> str:
    """A config of some target layers of a tiny model; each is a path of the UNet, or the end of an encoder's."""
    data: dict[str, Any] = {"base_model": model, "lora_rank": 4, "lora_alpha": 4}
    for component, layers in target_layers(model).items():
        sizes = {target: size for target in targets for layer, size in layers.items() if layer.endswith(target)}
        data[f"target_layers_{component}"] = list(sizes)
        data[f"layer_dimensions_{component}"] = sizes
    path.write_text(json.dumps(data))
    return str(path)


def by_component(names: tuple[str, ...]) -> dict[str, int]:
    return dict(Counter(name.partition(".")[0] for name in names))


def test_a_run_says_in_plain_words_what_the_default_loss_cannot_reach(
    model: str, unet_layers: int, tmp_path: Path
) -> None:
    result = lora_forge.run(PROMPT, model, iterations=2, output=tmp_path / "kept.safetensors")
    assert by_component(result.inert) == {"unet": unet_layers}
    assert result.dropped == ()
    (warning,) = result.warnings
    assert "inert" in warning
    assert f"unet ({unet_layers} of {unet_layers} layers)" in warning

    unet = {name: tensor for name, tensor in load_file(result.path).items() if name.startswith("lora_unet")}
    assert len(unet) == 3 * unet_layers
    assert not any(tensor.any() for name, tensor in unet.items() if name.endswith("lora_up.weight"))


@pytest.mark.parametrize("saver", ["safetensors", "diffusers"])
def test_dropping_leaves_the_layers_out_of_reach_out_of_the_file(
    pipe: Any, model: str, unet_layers: int, tmp_path: Path, saver: str
) -> None:
    output = tmp_path / "dropped.safetensors"
    result = lora_forge.run(PROMPT, model, iterations=2, inert="drop", saver=saver, output=output)

    assert result.dropped == result.inert
    assert result.padded == ()
    assert any("left out" in warning for warning in result.warnings)
    assert not any("unet" in name for name in load_file(output))
    loaded = load_whole(pipe, output, without=["unet"])
    expected = {(c, layer) for c, layers in result.weights.items() for layer in layers if c != "unet"}
    assert loaded.keys() == expected
    assert len(result.weights["unet"]) == unet_layers


def test_inert_layers_can_be_an_error_and_then_nothing_is_written(
    model: str, unet_layers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "none.safetensors"
    arguments = ["run", "--prompt", PROMPT, "--model", model, "--iterations", "2", "--inert", "error"]
    assert main([*arguments, "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert f"unet ({unet_layers} of {unet_layers} layers)" in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_inert_layers_are_no_error_where_all_are_reached(model: str, tmp_path: Path) -> None:
    config = model_config(tmp_path / "encoders_config.json", model, "q_proj", "k_proj", "v_proj", "out_proj")
    result = lora_forge.run(PROMPT, config, iterations=2, inert="error", output=tmp_path / "all.safetensors")
    assert result.inert == result.dropped == result.padded == result.warnings == ()


@pytest.mark.parametrize("inert", ["keep", "drop", "error"])
@pytest.mark.parametrize("saver", ["safetensors", "diffusers"])
def test_an_attention_targeted_in_part_is_padded_with_zeros_and_loads_whole(
    pipe: Any, model: str, tmp_path: Path, saver: str, inert: str
) -> None:
    config = model_config(tmp_path / "part_config.json", model, "q_proj", "k_proj")
    output = tmp_path / "part.safetensors"
    result = lora_forge.run(PROMPT, config, iterations=2, alpha=10, inert=inert, saver=saver, output=output)
    loaded = load_whole(pipe, output, without=["unet"])

    padded = {
        (component, f"text_model.encoder.layers.{block}.self_attn.{leaf}")
        for component, blocks in encoder_blocks(model).items()
        for block in range(blocks)
        for leaf in ("v_proj", "out_proj")
    }
    trained = {(component, layer) for component, layers in result.weights.items() for layer in layers}
    assert len(trained) == len(padded) == 2 * sum(encoder_blocks(model).values())
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


def test_padding_that_stands_beside_left_out_layers_is_said_in_words(model: str, tmp_path: Path) -> None:
    blocks = sum(encoder_blocks(model).values())
    unet = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    config = model_config(tmp_path / "mixed_config.json", model, "q_proj", unet)
    result = lora_forge.run(PROMPT, config, iterations=2, inert="drop", output=tmp_path / "mixed.safetensors")
    assert by_component(result.dropped) == {"unet": 1}
    assert len(result.padded) == 3 * blocks
    assert any(f"{3 * blocks} layers of zeros" in warning for warning in result.warnings)


def test_a_loss_on_penultimate_states_leaves_the_last_layer_of_each_encoder_inert(
    pipe: Any, model: str, unet_layers: int, tmp_path: Path
) -> None:
    output = tmp_path / "penultimate.safetensors"
    result = lora_forge.run(
        PROMPT,
        model,
        iterations=2,
        loss="penultimate",
        plugins=[plugin(tmp_path, PENULTIMATE)],
        inert="drop",
        output=output,
    )
    blocks = encoder_blocks(model)
    last = {encoder: f"text_model.encoder.layers.{count - 1}." for encoder, count in blocks.items()}
    expected = {
        f"{component}.{layer}"
        for component, layers in result.weights.items()
        for layer in layers
        if component == "unet" or layer.startswith(last[component])
    }
    assert set(result.inert) == set(result.dropped) == expected
    assert by_component(result.inert) == {**dict.fromkeys(blocks, 4), "unet": unet_layers}
    loaded = load_whole(pipe, output, without=["unet"])
    assert {f"{component}.{layer}" for component, layer in loaded}.isdisjoint(expected)
    assert len(loaded) == 4 * sum(count - 1 for count in blocks.values())


def test_a_loss_on_noise_prediction_reaches_the_unet_and_of_the_encoders_what_it_is_conditioned_on(
    family: Family, model: str, tmp_path: Path
) -> None:
    result = lora_forge.run(
        PROMPT, model, iterations=2, loss="noise", plugins=[plugin(tmp_path, NOISE)], optimizer="adamw"
    )
    assert all(pair["lora_B"].any() for pair in result.weights["unet"].values())
    # SDXL's UNet reads the penultimate state of the first encoder: its last block is behind it. The second
    # encoder's last block is in its pooled projection. Stable Diffusion 1.x reads its encoder's last state.
    behind = {"sdxl": {"text_encoder": 4}, "sd15": {}}
    assert by_component(result.inert) == behind[family.name]
    assert all(name.startswith("text_encoder.text_model.encoder.layers.2.") for name in result.inert)
    assert result.loss_after < result.loss_before


def test_a_unet_alone_can_be_trained_through_its_noise_prediction(
    pipe: Any, family: Family, model: str, tmp_path: Path
) -> None:
    unet = (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    )
    output = tmp_path / "unet.safetensors"
    result = lora_forge.run(
        PROMPT,
        model_config(tmp_path / "unet_config.json", model, *unet),
        iterations=3,
        loss="noise",
        plugins=[plugin(tmp_path, NOISE)],
        inert="error",
        output=output,
    )
    assert result.inert == ()
    loaded = load_whole(pipe, output, without=list(family.encoders))
    assert loaded.keys() == {("unet", layer) for layer in unet}
    assert all(layer.delta.any() for layer in loaded.values())


def test_asking_for_noise_prediction_without_declaring_it_is_an_error_that_says_so(tmp_path: Path) -> None:
    undeclared = NOISE.replace('{"text", "noise_prediction"}', '{"text"}')
    with pytest.raises(lora_forge.errors.RunFailed, match="does not declare"):
        lora_forge.run(PROMPT, "tiny_sdxl", iterations=1, loss="noise", plugins=[plugin(tmp_path, undeclared)])


def test_an_objective_that_reaches_nothing_is_an_error_before_anything_is_loaded(
    family: Family, model: str, tmp_path: Path
) -> None:
    path = tmp_path / "unet_config.json"
    model_config(path, model, "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    path.write_text(json.dumps({**json.loads(path.read_text()), "backend": family.name}))
    with pytest.raises(ObjectiveError, match="nothing would be trained"):
        lora_forge.run(PROMPT, str(path), iterations=1, base_model=str(tmp_path / "none"))
