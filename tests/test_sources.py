"""Where a base model may come from, and that no more of it is read than is reached."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from single_file_checkpoint import FIRST, SECOND, write_single_file

import lora_forge
from lora_forge.cli.main import main
from lora_forge.clip_unet.encoders import canonical_name, load_encoder
from lora_forge.clip_unet.family import Family
from lora_forge.clip_unet.sources import open_source
from lora_forge.errors import ModelError

PROMPT = "a steampunk owl"
FULL_SIZE = {"sdxl": ("sdxl_base", 560), "sd15": ("sd15", 128)}  # the config that ships, and its layers in the UNet
UNET_LOSS = """
from lora_forge import LossSpec, hookimpl
import torch

def noise(batch):
    latents = torch.ones((batch.prompts, *batch.latent_shape))
    predicted = batch.predict_noise(latents, torch.full((batch.prompts,), 500), batch.adapted(), adapted=True)
    return predicted.square().mean((1, 2, 3))

@hookimpl
def lora_forge_losses():
    yield LossSpec(name="noise", summary="small noise", needs={"text", "noise_prediction"}, factory=noise)
"""


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to change."""
    return Path(shutil.copytree(model_folder, tmp_path / "base"))


@pytest.fixture(scope="module")
def single_file(family: Family, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_single_file(family.name, model_folder, tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors")


@pytest.fixture(scope="module")
def reference(model: str) -> lora_forge.RunResult:
    return lora_forge.run(PROMPT, model, iterations=2)


@pytest.fixture(scope="module")
def noise_plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugin") / "noise_loss.py"
    path.write_text(UNET_LOSS)
    return path


def assert_equal_runs(one: lora_forge.RunResult, other: lora_forge.RunResult) -> None:
    assert [step.loss for step in one.steps] == [step.loss for step in other.steps]
    assert one.weights.keys() == other.weights.keys()
    for component, layers in other.weights.items():
        for layer, pair in layers.items():
            assert torch.equal(one.weights[component][layer]["lora_A"], pair["lora_A"])
            assert torch.equal(one.weights[component][layer]["lora_B"], pair["lora_B"])


def parameters(
    family: Family, source: Path, component: str, dtype: torch.dtype = torch.float32, configs: Path | None = None
) -> dict[str, Any]:
    source_of = open_source(str(source), family, configs)
    encoder = load_encoder(component, family.encoders[component], source_of, device="cpu", dtype=dtype)
    return {canonical_name(component, name): parameter for name, parameter in encoder.named_parameters()}


def shard(file: Path, variant: str = "") -> None:
    """Split a weight file in two and an index, as `save_pretrained` does with large ones."""
    tensors = load_file(file)
    file.unlink()
    stem = file.name.removesuffix(".safetensors")
    names = sorted(tensors)
    halves = {1: names[: len(names) // 2], 2: names[len(names) // 2 :]}
    weight_map: dict[str, str] = {}
    for number, half in halves.items():
        shard_name = f"{stem}{variant}-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in half}, file.with_name(shard_name), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(half, shard_name)
    index = file.with_name(f"{stem}.safetensors.index{variant}.json")
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def rename_to_fp16(folder: Path) -> None:
    for file in folder.glob("*/*.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_folder_s_encoders_are_loaded_frozen_and_whole_in_the_dtype_asked_for(
    family: Family, model_folder: Path, dtype: torch.dtype
) -> None:
    for component in family.encoders:
        stored = load_file(model_folder / component / "model.safetensors")
        loaded = parameters(family, model_folder, component, dtype)
        assert loaded.keys() == stored.keys()
        for name, parameter in loaded.items():
            assert parameter.dtype == dtype
            assert not parameter.requires_grad
            assert torch.equal(parameter, stored[name].to(dtype))


def test_an_encoder_computes_what_the_library_s_own_loading_makes_of_it(family: Family, model_folder: Path) -> None:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    ids = torch.tensor([[49406, 320, 4321, 49407] + [49407] * 73])
    for component, kind in family.encoders.items():
        source = open_source(str(model_folder), family, None)
        ours = load_encoder(component, kind, source, device="cpu", dtype=torch.float32)
        library: Any = CLIPTextModelWithProjection if kind.projection else CLIPTextModel
        theirs = library.from_pretrained(model_folder / component, dtype=torch.float32)
        with torch.no_grad():
            one, other = ours(ids, output_hidden_states=True), theirs(ids, output_hidden_states=True)
        assert torch.equal(one.last_hidden_state, other.last_hidden_state)
        assert torch.equal(one.hidden_states[-2], other.hidden_states[-2])


@pytest.mark.parametrize("layout", ["fp16 names", "shards", "shards with fp16 names", "keys without text_model"])
def test_a_folder_is_the_same_model_in_every_layout_it_is_published_in(
    model: str, family: Family, folder: Path, reference: lora_forge.RunResult, layout: str
) -> None:
    if layout == "fp16 names":
        rename_to_fp16(folder)
    elif layout == "keys without text_model":
        file = folder / "text_encoder" / "model.safetensors"
        tensors = {name.removeprefix("text_model."): tensor for name, tensor in load_file(file).items()}
        assert "encoder.layers.0.self_attn.q_proj.weight" in tensors
        save_file(tensors, file)
    else:
        for component in family.encoders:
            shard(folder / component / "model.safetensors", ".fp16" if "fp16" in layout else "")
    assert_equal_runs(lora_forge.run(PROMPT, model, base_model=str(folder), iterations=2), reference)


@pytest.mark.parametrize("layout", ["plain", "fp16 names", "shards", "shards with fp16 names"])
def test_a_unet_is_loaded_from_every_layout_where_it_is_needed(
    model: str, folder: Path, noise_plugin: Path, layout: str
) -> None:
    if layout == "fp16 names":
        rename_to_fp16(folder)
    elif layout.startswith("shards"):
        shard(folder / "unet" / "diffusion_pytorch_model.safetensors", ".fp16" if "fp16" in layout else "")
    settings: dict[str, Any] = {"loss": "noise", "plugins": [noise_plugin], "iterations": 2}
    result = lora_forge.run(PROMPT, model, base_model=str(folder), **settings)
    assert_equal_runs(result, lora_forge.run(PROMPT, model, **settings))


def test_every_encoder_parameter_of_a_single_file_is_that_of_the_folder(
    family: Family, model_folder: Path, single_file: Path
) -> None:
    for component in family.encoders:
        expected = parameters(family, model_folder, component)
        loaded = parameters(family, single_file, component, configs=model_folder)
        assert loaded.keys() == expected.keys()
        for name, parameter in expected.items():
            assert torch.equal(loaded[name], parameter), name


def test_the_single_file_of_these_tests_is_one_to_diffusers_own_conversion(
    family: Family, model_folder: Path, single_file: Path
) -> None:
    from diffusers.loaders import single_file_utils

    content = load_file(single_file)
    first = single_file_utils.convert_ldm_clip_checkpoint(content)
    assert _same(first, load_file(model_folder / "text_encoder" / "model.safetensors"))
    if family.name == "sdxl":

        class Model:
            class config:  # noqa: N801
                hidden_size = 48

        second = single_file_utils.convert_open_clip_checkpoint(Model, dict(content), prefix=SECOND)
        assert _same(second, load_file(model_folder / "text_encoder_2" / "model.safetensors"))


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_from_a_single_file_equals_the_run_from_the_folder(
    model: str, model_folder: Path, single_file: Path, reference: lora_forge.RunResult
) -> None:
    result = lora_forge.run(
        PROMPT,
        model,
        base_model=str(single_file),
        backend_options={"config": str(model_folder)},
        iterations=2,
    )
    assert_equal_runs(result, reference)
    assert f"from_single_file({str(single_file)!r}" in result.usage


def test_a_unet_is_loaded_from_a_single_file_where_it_is_needed(
    model: str, model_folder: Path, single_file: Path, noise_plugin: Path
) -> None:
    settings: dict[str, Any] = {"loss": "noise", "plugins": [noise_plugin], "iterations": 2}
    options = {"config": str(model_folder)}
    result = lora_forge.run(PROMPT, model, base_model=str(single_file), backend_options=options, **settings)
    assert_equal_runs(result, lora_forge.run(PROMPT, model, **settings))


def test_a_single_file_needs_no_folder_beside_it_for_its_configs(
    family: Family, single_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The family's own configs come with the package; a checkpoint of other sizes says which tensor does not fit."""
    config, layers = FULL_SIZE[family.name]
    command = ["run", "--prompt", PROMPT, "--model", config, "--base-model", str(single_file), "--iterations", "1"]
    assert main([*command, "--dry-run"]) == 0
    assert f"unet: {layers}" in capsys.readouterr().out
    assert main([*command, "--output", str(single_file.parent / "never.safetensors")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "shape" in error
    assert not (single_file.parent / "never.safetensors").exists()


def test_a_single_file_that_lacks_a_tensor_is_an_error_that_names_it(
    model: str, family: Family, model_folder: Path, single_file: Path, tmp_path: Path
) -> None:
    content = load_file(single_file)
    del content[f"{FIRST[family.name]}text_model.final_layer_norm.bias"]
    path = tmp_path / "part.safetensors"
    save_file(content, path)
    with pytest.raises(ModelError, match=r"final_layer_norm\.bias"):
        lora_forge.run(PROMPT, model, base_model=str(path), backend_options={"config": str(model_folder)}, iterations=1)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_a_pickled_checkpoint_is_refused(tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"\x80\x04.")
    output = tmp_path / "out.safetensors"
    assert main(["run", "--prompt", PROMPT, "--base-model", str(path), "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert "never pickles" in error
    assert error.count("\n") == 1
    assert not output.exists()


def test_a_pickled_encoder_in_a_folder_is_refused(model: str, folder: Path) -> None:
    (folder / "text_encoder" / "model.safetensors").rename(folder / "text_encoder" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickle"):
        lora_forge.run(PROMPT, model, base_model=str(folder), iterations=1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_of_half_precision_still_give_a_float32_lora(
    model: str, reference: lora_forge.RunResult, dtype: str
) -> None:
    result = lora_forge.run(PROMPT, model, dtype=dtype, iterations=2)
    for layers in result.weights.values():
        for pair in layers.values():
            assert pair["lora_A"].dtype == pair["lora_B"].dtype == torch.float32
    assert result.weights["text_encoder"]["text_model.encoder.layers.0.self_attn.v_proj"]["lora_B"].any()
    assert result.loss_before != reference.loss_before
    assert result.loss_before == pytest.approx(reference.loss_before, rel=0.02)


def test_the_default_loss_needs_neither_the_weights_of_the_unet_nor_a_vae(
    model: str, folder: Path, reference: lora_forge.RunResult
) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    shutil.rmtree(folder / "vae")
    result = lora_forge.run(PROMPT, model, base_model=str(folder), iterations=2)
    assert_equal_runs(result, reference)


def test_an_encoder_without_target_layers_is_not_loaded(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    (folder / "text_encoder" / "model.safetensors").unlink()
    config = {
        "base_model": str(folder),
        "lora_rank": 4,
        "lora_alpha": 4,
        "target_layers_text_encoder": [],
        "target_layers_text_encoder_2": ["v_proj"],
        "layer_dimensions_text_encoder_2": {"v_proj": [48, 48]},
    }
    path = tmp_path / "second_config.json"
    path.write_text(json.dumps(config))
    result = lora_forge.run(PROMPT, str(path), iterations=2)
    assert result.weights.keys() == {"text_encoder_2"}
    assert len(result.weights["text_encoder_2"]) == 4
    whole = lora_forge.run(PROMPT, str(path), base_model="tiny_sdxl", iterations=2)
    assert_equal_runs(result, whole)


@pytest.mark.parametrize(
    "missing",
    [
        "text_encoder/config.json",
        "{last_encoder}/model.safetensors",
        "tokenizer/vocab.json",
        "{last_tokenizer}/merges.txt",
        "unet/config.json",
    ],
)
def test_a_folder_that_lacks_a_file_is_an_error_that_names_it(
    model: str, family: Family, folder: Path, missing: str
) -> None:
    encoder, kind = list(family.encoders.items())[-1]
    file = missing.format(last_encoder=encoder, last_tokenizer=kind.tokenizer)
    (folder / file).unlink()
    with pytest.raises(ModelError) as caught:
        lora_forge.run(PROMPT, model, base_model=str(folder), iterations=1)
    assert file in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "damage", ["truncated weights", "config no JSON", "index no JSON", "index no map", "shard gone"]
)
def test_a_broken_folder_is_an_error_of_one_line(model: str, folder: Path, damage: str) -> None:
    weights = folder / "text_encoder" / "model.safetensors"
    if damage == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "config no JSON":
        (folder / "text_encoder" / "config.json").write_text("{")
    elif damage == "shard gone":
        shard(weights)
        (folder / "text_encoder" / "model-00002-of-00002.safetensors").unlink()
    else:
        shard(weights)
        content = "{" if damage == "index no JSON" else "{}"
        (folder / "text_encoder" / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError) as caught:
        lora_forge.run(PROMPT, model, base_model=str(folder), iterations=1)
    assert "\n" not in str(caught.value)
    assert "text_encoder" in str(caught.value)


FROM_THE_HUB = """
import json, sys
import lora_forge
from lora_forge.cli.main import main

sums = {}
for name in ("someone/tiny-sdxl", "someone/tiny-sdxl-fp16"):
    result = lora_forge.run("a steampunk owl", "tiny_sdxl", base_model=name, iterations=2)
    sums[name] = [step.loss for step in result.steps]
code = main(["run", "--prompt", "x", "--model", "tiny_sdxl", "--base-model", "nobody/nothing-here", "-o", sys.argv[1]])
print(json.dumps({"losses": sums, "code": code}))
"""


def test_a_hub_id_is_found_in_the_hub_s_cache_and_an_unknown_one_is_one_line(tiny_folder: Path, tmp_path: Path) -> None:
    for repository, change in (("tiny-sdxl", None), ("tiny-sdxl-fp16", rename_to_fp16)):
        cached = tmp_path / "hub" / f"models--someone--{repository}"
        snapshot = cached / "snapshots" / ("0" * 40)
        shutil.copytree(tiny_folder, snapshot)
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("0" * 40)
        if change:
            change(snapshot)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    output = tmp_path / "out.safetensors"
    command = [sys.executable, "-c", FROM_THE_HUB, str(output)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    expected = [step.loss for step in lora_forge.run(PROMPT, "tiny_sdxl", iterations=2).steps]
    assert report["losses"] == {"someone/tiny-sdxl": expected, "someone/tiny-sdxl-fp16": expected}
    assert report["code"] == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("lora-forge: ")]
    assert len(errors) == 1
    assert "nobody/nothing-here" in errors[0]
    assert "Traceback" not in done.stderr
    assert not output.exists()
