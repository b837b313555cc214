"""`lora-forge convert`: the same effect in another format, there and back, and refusals that write nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_reader import load_whole, open_pipeline
from layer_files import (
    Layer,
    Layers,
    assert_same_delta,
    contents,
    metadata_of,
    named,
    random_layers,
    read_layers,
    save_diffusers,
    save_kohya,
    save_peft,
    save_universal,
)
from refusals import refused
from safetensors.torch import load_file, save_file
from tiny_models import layout_of

import lora_forge
from lora_forge.cli.main import main
from lora_forge.clip_unet.family import Family
from lora_forge.files.formats import FORMATS
from lora_forge.files.names import universal_name

THERE_AND_BACK = [(one, other) for one in FORMATS for other in FORMATS if one != other]


HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")


def converted(source: Path, output: Path, format: str, *options: str) -> Path:
    assert main(["convert", str(source), str(output), "--to", format, *options]) == 0
    return named(output, format)


def written(path: Path, family: str, layers: Layers, format: str, alpha: float = 4.0) -> Path:
    """A file as others write it: without alpha where the format has none, and without anything recorded."""
    metadata = dict(layout_of(family).metadata)
    if format == "safetensors":
        return save_universal(path, family, layers, metadata)
    if format == "diffusers":
        return save_diffusers(path, layers, metadata)
    return save_peft(path, layers, {"lora_alpha": alpha, "r": 4, "target_modules": []}, metadata)


@pytest.fixture(scope="module")
def pipe(family: Family, model_folder: Path) -> Any:
    return open_pipeline(family.name, model_folder)


@pytest.mark.parametrize(("dtype", "alpha"), [(torch.float32, 0.5), (torch.float16, 8.0), (torch.bfloat16, -2.0)])
@pytest.mark.parametrize(("first", "second"), THERE_AND_BACK)
def test_there_and_back_gives_the_same_tensors_to_the_byte(
    model: str, family: Family, tmp_path: Path, first: str, second: str, dtype: torch.dtype, alpha: float
) -> None:
    layers = random_layers(model, alpha=alpha, dtype=dtype)
    # The first conversion makes the file ours: PEFT's keys are those of the transformers installed, say.
    source = converted(written(tmp_path / "0", family.name, layers, first, alpha), tmp_path / "1", first)
    there = converted(source, tmp_path / "2", second)
    back = converted(there, tmp_path / "3", first)

    assert contents(back) == contents(source)
    assert metadata_of(back).items() >= metadata_of(source).items()
    expected = {key: one._replace(alpha=None) for key, one in layers.items()} if first == "diffusers" else layers
    assert_same_delta(read_layers(there, family.name, layers), expected)
    found = read_layers(back, family.name, layers)
    assert all(torch.equal(found[key].down, one.down) for key, one in layers.items())
    assert all(torch.equal(found[key].up, one.up) for key, one in layers.items())


def test_nothing_is_said_of_rounding_where_nothing_rounds(
    model: str, family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_universal(tmp_path / "a.safetensors", family.name, random_layers(model, alpha=0.5))
    converted(source, tmp_path / "b.safetensors", "diffusers")
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.startswith(f"{tmp_path / 'b.safetensors'}: kohya → diffusers, text_encoder ")


@pytest.mark.parametrize("alpha", [3.0, 10.0, 0.1, -7.0])
@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 2**-23), (torch.float16, 2**-10), (torch.bfloat16, 2**-7)])
def test_an_alpha_that_rounds_keeps_the_delta_to_two_units_in_the_last_place_and_it_is_said(
    model: str,
    family: Family,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    alpha: float,
    dtype: torch.dtype,
    eps: float,
) -> None:
    layers = random_layers(model, alpha=torch.tensor(alpha), dtype=dtype)
    source = save_universal(tmp_path / "a.safetensors", family.name, layers)
    there = converted(source, tmp_path / "b.safetensors", "diffusers")
    assert "unet: alpha / rank, " in (said := capsys.readouterr().err)
    assert said.count("2 units in the last place") == len(family.components)
    back = converted(there, tmp_path / "c.safetensors", "safetensors")

    assert_same_delta(read_layers(there, family.name, layers), layers, units=1, eps=eps)
    assert_same_delta(read_layers(back, family.name, layers), layers, units=2, eps=eps)
    alphas = {float(one.alpha or 0) for one in read_layers(back, family.name, layers).values()}
    assert alphas == {float(torch.tensor(alpha))}


@pytest.mark.parametrize(("size", "alpha"), [(1e-7, 0.125), (6e4, 64.0)])
def test_a_dtype_too_narrow_for_the_folded_alpha_gives_way_to_float32_and_comes_back(
    model: str, family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: float, alpha: float
) -> None:
    layers = random_layers(model, alpha=alpha, dtype=torch.float16)
    layers = {key: one._replace(up=(one.up * size).clamp(-65504, 65504)) for key, one in layers.items()}
    source = save_universal(tmp_path / "a.safetensors", family.name, layers)
    there = converted(source, tmp_path / "b.safetensors", "diffusers")
    assert "B in float32" in capsys.readouterr().err
    assert_same_delta(read_layers(there, family.name, layers), layers)
    back = converted(there, tmp_path / "c.safetensors", "safetensors")
    assert contents(back) == contents(source)


def test_numbers_beyond_float32_are_refused_and_the_layer_is_named(
    model: str, family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = random_layers(model, alpha=64.0)
    layers = {key: one._replace(up=one.up * 0 + 3e38) for key, one in layers.items()}
    source = save_universal(tmp_path / "a.safetensors", family.name, layers)
    error = refused(capsys, "convert", source, tmp_path / "b.safetensors", "--to", "diffusers")
    assert "text_encoder.text_model.encoder.layers.0." in error
    assert "beyond float32" in error
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_an_alpha_of_half_precision_comes_back_as_it_was(
    model: str, family: Family, tmp_path: Path, format: str
) -> None:
    layers = random_layers(model, alpha=torch.tensor(4.0).half(), dtype=torch.float16)
    source = save_universal(tmp_path / "a.safetensors", family.name, layers, layout_of(family.name).metadata)
    there = converted(source, tmp_path / "b", format)
    assert contents(converted(there, tmp_path / "c.safetensors", "safetensors")) == contents(source)


def _only_q(layer: str) -> bool:
    return layer.endswith(("q_proj", "to_q"))


@pytest.mark.parametrize(("first", "second"), [(a, b) for a, b in THERE_AND_BACK if b != "peft"])
def test_layers_of_zeros_that_readers_demand_are_added_and_taken_out_again(
    model: str,
    family: Family,
    pipe: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    first: str,
    second: str,
) -> None:
    layers = random_layers(model, alpha=4.0, chosen=_only_q)
    source = written(tmp_path / "0", family.name, layers, first)
    there = converted(source, tmp_path / "1.safetensors", second)
    text = {key for key in layers if key[0] != "unet"}
    assert f"{3 * len(text)} layers of zeros added" in capsys.readouterr().err
    everything = {**layers, **{(c, name.replace("q_proj", p)): None for c, name in text for p in _OTHERS}}
    found = read_layers(there, family.name, everything)
    assert found.keys() == everything.keys()
    assert not any(found[key].delta.any() for key in found.keys() - layers.keys())
    assert load_whole(pipe, there).keys() == everything.keys()

    back = converted(there, tmp_path / "2", first)
    assert read_layers(back, family.name, everything).keys() == layers.keys()
    assert_same_delta(read_layers(back, family.name, everything), layers)
    assert len(contents(back)) == len(contents(source))


_OTHERS = ("k_proj", "v_proj", "out_proj")


def test_padding_that_is_no_longer_zero_stays(model: str, family: Family, tmp_path: Path) -> None:
    layers = random_layers(model, alpha=4.0, chosen=_only_q)
    source = written(tmp_path / "0", family.name, layers, "peft")
    there = converted(source, tmp_path / "1.safetensors", "diffusers")
    tensors = load_file(there)
    name = "text_encoder.text_model.encoder.layers.0.self_attn.out_proj.lora_B.weight"
    tensors[name] = torch.ones_like(tensors[name])
    save_file(tensors, there, metadata_of(there))
    back = converted(there, tmp_path / "2", "peft")
    kept = ("text_encoder", "text_model.encoder.layers.0.self_attn.out_proj")
    assert read_layers(back, family.name, {**layers, kept: None}).keys() == {*layers, kept}


@pytest.mark.parametrize("format", FORMATS)
def test_layers_that_differ_in_rank_and_alpha_become_alike_with_the_same_delta(
    model: str, family: Family, pipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str
) -> None:
    layers = {
        **random_layers(model, rank=4, alpha=4.0),
        **random_layers(model, rank=8, alpha=1.0, chosen=lambda layer: layer.endswith(("to_k", "k_proj")), seed=1),
        **random_layers(model, rank=2, alpha=4.0, chosen=lambda layer: layer.endswith(("to_v", "v_proj")), seed=2),
    }
    source = save_universal(tmp_path / "a.safetensors", family.name, layers, layout_of(family.name).metadata)
    output = converted(source, tmp_path / "b", format)
    said = capsys.readouterr().err
    assert "unet: ranks 2 to 8 and alphas 1 to 4 become one rank 8 and one alpha 8" in said
    assert "ΔW stays the same\n" in said
    found = read_layers(output, family.name, layers)
    assert_same_delta(found, layers)
    assert {(one.down.shape[0], None if one.alpha is None else float(one.alpha)) for one in found.values()} == {
        (8, None if format == "diffusers" else 8.0)
    }
    if format != "peft":
        output = output.rename(tmp_path / "b.safetensors")
        for key, loaded in load_whole(pipe, output).items():
            torch.testing.assert_close(loaded.delta.double(), layers[key].delta, rtol=1e-5, atol=1e-6)


def test_padding_to_one_rank_never_makes_a_file_many_times_as_large(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers: Layers = {("unet", "conv_in"): Layer(torch.ones(60_000, 4), torch.ones(4, 60_000), 1.0)}
    for number in range(20):
        name = f"up_blocks.1.attentions.0.transformer_blocks.{number}.attn1.to_q"
        layers["unet", name] = Layer(torch.ones(1, 4000), torch.ones(4000, 1), 1.0)
    source = save_universal(tmp_path / "a.safetensors", "sdxl", layers)
    error = refused(capsys, "convert", source, tmp_path / "b", "--to", "diffusers")
    assert "ranks from 1 to 60000; padded to one they would take" in error


def _old_name(component: str, layer: str) -> str:
    """kohya's prefix with diffusers' block names, as many SDXL files have them."""
    prefix = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2", "unet": "lora_unet"}[component]
    return f"{prefix}_{layer}".replace(".", "_")


def _processor_keys(component: str, layer: str) -> tuple[str, str]:
    """diffusers' first spelling: LoRA in the attention processors."""
    if component != "unet":
        return f"{component}.{layer}.lora_linear_layer.down.weight", f"{component}.{layer}.lora_linear_layer.up.weight"
    block, _, leaf = layer.removesuffix(".0").rpartition(".")
    return f"unet.{block}.processor.{leaf}_lora.down.weight", f"unet.{block}.processor.{leaf}_lora.up.weight"


@pytest.mark.parametrize("spelling", ["diffusers' blocks", "no text_model", "attention processors", "peft in one file"])
def test_every_spelling_of_a_layer_is_read(spelling: str, tmp_path: Path) -> None:
    layers = random_layers("tiny_sdxl", alpha=4.0)
    expected = contents(save_universal(tmp_path / "expected.safetensors", "sdxl", layers))
    source = tmp_path / "a.safetensors"
    metadata = layout_of("sdxl").metadata
    if spelling == "diffusers' blocks":
        save_kohya(source, layers, _old_name)
    elif spelling == "no text_model":
        flat = {(component, layer.removeprefix("text_model.")): one for (component, layer), one in layers.items()}
        save_diffusers(source, flat, metadata)
    elif spelling == "peft in one file":
        tensors = {f"base_model.model.{c}.{layer}.lora_A.weight": one.down for (c, layer), one in layers.items()}
        tensors |= {f"base_model.model.{c}.{layer}.lora_B.weight": one.up for (c, layer), one in layers.items()}
        save_file(tensors, source, dict(metadata))
    else:
        pairs = {key: _processor_keys(*key) for key in layers}
        tensors = {names[0]: layers[key].down for key, names in pairs.items()}
        save_file(tensors | {names[1]: layers[key].up for key, names in pairs.items()}, source, dict(metadata))
    assert contents(converted(source, tmp_path / "b.safetensors", "safetensors")) == expected


def test_what_peft_s_config_says_of_single_layers_is_kept(model: str, family: Family, tmp_path: Path) -> None:
    layers = random_layers(model, rank=4, chosen=lambda layer: layer.endswith((".to_q", ".to_k")))
    layers = {key: one._replace(alpha=1.0 if key[1].endswith("to_k") else 6.0) for key, one in layers.items()}
    config = {"lora_alpha": 3.0, "alpha_pattern": {"to_k": 0.5}, "use_rslora": True}  # alpha / √4
    source = save_peft(tmp_path / "a", layers, config, layout_of(family.name).metadata)
    output = converted(source, tmp_path / "b.safetensors", "safetensors")
    assert_same_delta(read_layers(output, family.name, layers), layers, units=2)


def test_what_diffusers_metadata_says_of_alpha_is_kept_and_the_metadata_is_not(
    model: str, family: Family, tmp_path: Path
) -> None:
    layers = random_layers(model, alpha=8.0)
    config = json.dumps({f"{component}.lora_alpha": 8 for component in family.components})
    metadata = {**layout_of(family.name).metadata, "lora_adapter_metadata": config}
    source = save_diffusers(tmp_path / "a.safetensors", layers, metadata)
    for format in FORMATS:
        output = converted(source, tmp_path / format, format)
        assert_same_delta(read_layers(output, family.name, layers), layers)
        assert "lora_adapter_metadata" not in metadata_of(output)


def test_the_metadata_of_other_tools_is_kept_but_what_hashes_the_tensors(
    model: str, family: Family, tmp_path: Path
) -> None:
    theirs = {"ss_tag_frequency": '{"owl": {"🦉": 3}}', "modelspec.title": "an owl", "format": "pt", "empty": ""}
    stale = dict.fromkeys(HASHES, "0x00")
    layers = random_layers(model, alpha=8.0)
    source = save_universal(tmp_path / "a.safetensors", family.name, layers, {**theirs, **stale})
    for format in FORMATS:
        output = converted(source, tmp_path / format, format)
        for file in output.rglob("*.safetensors") if format == "peft" else [output]:
            found = metadata_of(file)
            assert {key: found.get(key) for key in theirs} == theirs
            assert not {key for key, text in stale.items() if found.get(key) == text}
            assert (found.keys() >= stale.keys()) == (format == "safetensors")
            assert found["ss_base_model_version"] == layout_of(family.name).metadata["ss_base_model_version"]


def test_a_run_s_own_files_are_converted_with_their_record(model: str, family: Family, tmp_path: Path) -> None:
    first = tmp_path / "a.safetensors"
    lora_forge.run("an owl", model, iterations=2, output=first)
    there = converted(first, tmp_path / "b", "peft")
    back = converted(there, tmp_path / "c.safetensors", "safetensors")
    assert back.read_bytes() == first.read_bytes()
    assert metadata_of(there) == {key: text for key, text in metadata_of(first).items() if key not in HASHES}


@pytest.mark.parametrize("family_name", ["sdxl", "sd15"])
def test_every_published_layer_name_comes_back_as_it_was(family_name: str, tmp_path: Path) -> None:
    names = (Path(__file__).parent / "data" / f"real_{family_name}_layer_names.txt").read_text().split()
    tensors = {}
    for number, name in enumerate(names):
        tensors[f"{name}.lora_down.weight"] = torch.full((2, 3), float(number))
        tensors[f"{name}.lora_up.weight"] = torch.full((3, 2), float(number))
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    source = tmp_path / "a.safetensors"
    save_file(tensors, source, dict(layout_of(family_name).metadata))
    there = converted(source, tmp_path / "b", "diffusers")
    assert len(contents(there)) == 2 * len(names)
    assert contents(converted(there, tmp_path / "c", "safetensors")) == contents(source)


def test_a_layer_s_name_in_the_output_is_the_family_s(model: str, family: Family, tmp_path: Path) -> None:
    layers = random_layers(model, alpha=4.0)
    there = converted(save_universal(tmp_path / "a", family.name, layers), tmp_path / "b", "diffusers")
    back = load_file(converted(there, tmp_path / "c", "safetensors"))
    assert {key.partition(".")[0] for key in back} == {universal_name(layout_of(family.name), *key) for key in layers}
