"""`lora-forge merge`: the weighted sum of LoRAs, exactly or of a given rank, against ΔW computed whole."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_reader import load_whole, open_pipeline
from layer_files import (
    Key,
    Layer,
    Layers,
    contents,
    metadata_of,
    named,
    random_layers,
    read_layers,
    save_diffusers,
    save_universal,
)
from refusals import refused
from safetensors.torch import load_file, save_file
from tiny_models import layout_of

from lora_forge.cli.main import main
from lora_forge.clip_unet.family import Family
from lora_forge.files.formats import FORMATS

Deltas = dict[Key, torch.Tensor]


def merged(output: Path, *arguments: str) -> Path:
    assert main(["merge", *arguments, "-o", str(output)]) == 0
    return named(output, "peft" if "peft" in arguments else "")


def weighted_sum(*parts: tuple[float, Layers]) -> Deltas:
    """Σ weight · ΔW, each a whole matrix, float64."""
    result: Deltas = {}
    for weight, layers in parts:
        for key, one in layers.items():
            result[key] = result.get(key, torch.zeros((), dtype=torch.float64)) + weight * one.delta
    return result


def magnitudes(*parts: tuple[float, Layers]) -> Deltas:
    result: Deltas = {}
    for weight, layers in parts:
        for key, one in layers.items():
            result[key] = result.get(key, torch.zeros((), dtype=torch.float64)) + abs(weight) * one.magnitude
    return result


@pytest.fixture
def two(model: str, family: Family, tmp_path: Path) -> tuple[Path, Path, Layers, Layers]:
    """Two files of other ranks, alphas and layers; the second is without alpha, in diffusers' spelling."""
    one = random_layers(model, rank=4, alpha=3.0, seed=1, chosen=lambda layer: not layer.endswith("to_v"))
    other = random_layers(model, rank=2, alpha=None, seed=2, chosen=lambda layer: not layer.endswith("to_k"))
    metadata = layout_of(family.name).metadata
    a = save_universal(tmp_path / "a.safetensors", family.name, one, metadata)
    return a, save_diffusers(tmp_path / "b.safetensors", other, metadata), one, other


@pytest.mark.parametrize("format", FORMATS)
def test_a_merge_is_the_weighted_sum_with_one_rank_and_alpha_per_component(
    family: Family, two: tuple[Path, Path, Layers, Layers], tmp_path: Path, format: str
) -> None:
    a, b, one, other = two
    output = merged(tmp_path / "c", f"{a}:0.8", f"{b}:-0.5", "--to", format)
    expected, sizes = weighted_sum((0.8, one), (-0.5, other)), magnitudes((0.8, one), (-0.5, other))
    found = read_layers(output, family.name, expected)
    assert found.keys() == expected.keys()
    for key, delta in expected.items():
        assert bool(((found[key].delta - delta).abs() <= 2**-24 * sizes[key]).all()), key
        assert found[key].down.shape[0] == 6
        assert found[key].alpha == (None if format == "diffusers" else 6)


@pytest.mark.parametrize("format", ["safetensors", "diffusers"])
def test_diffusers_loads_a_merge_whole(
    family: Family, model_folder: Path, two: tuple[Path, Path, Layers, Layers], tmp_path: Path, format: str
) -> None:
    a, b, one, other = two
    output = merged(tmp_path / "c.safetensors", f"{a}:0.8", str(b), "--to", format)
    loaded = load_whole(open_pipeline(family.name, model_folder), output)
    expected = weighted_sum((0.8, one), (1, other))
    assert loaded.keys() == expected.keys()
    for key, layer in loaded.items():
        torch.testing.assert_close(layer.delta.double(), expected[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_weight_that_half_precision_would_round_is_kept_in_float32(
    model: str, family: Family, tmp_path: Path, dtype: torch.dtype
) -> None:
    layers = random_layers(model, alpha=4.0, dtype=dtype)
    source = save_universal(tmp_path / "a.safetensors", family.name, layers)
    output = read_layers(merged(tmp_path / "b.safetensors", f"{source}:0.7"), family.name, layers)
    exact = read_layers(merged(tmp_path / "c.safetensors", f"{source}:0.5"), family.name, layers)
    for key, one in layers.items():
        assert (output[key].down.dtype, output[key].up.dtype) == (dtype, torch.float32)
        assert bool(((output[key].delta - 0.7 * one.delta).abs() <= 2**-24 * one.magnitude).all())
        assert torch.equal(exact[key].up, one.up * 0.5)
        assert exact[key].up.dtype == dtype


def best(delta: torch.Tensor, rank: int) -> tuple[float, float]:
    """‖ΔW‖² and what the nearest matrix of `rank` leaves of it, from the whole matrix (Eckart and Young)."""
    singular = torch.linalg.svdvals(delta)
    return float((singular**2).sum()), float((singular[rank:] ** 2).sum())


@pytest.mark.parametrize("rank", [1, 3])
def test_a_merge_of_a_given_rank_is_the_nearest_there_is_and_prints_what_is_lost(
    family: Family,
    two: tuple[Path, Path, Layers, Layers],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rank: int,
) -> None:
    a, b, one, other = two
    output = merged(tmp_path / "c", f"{a}:0.8", f"{b}:0.5", "--rank", str(rank))
    expected = weighted_sum((0.8, one), (0.5, other))
    found = read_layers(output, family.name, expected)
    printed = capsys.readouterr().out
    for component in family.components:
        own = {layer: best(delta, rank) for (its, layer), delta in expected.items() if its == component}
        for layer, (norm, lost) in own.items():
            difference = float((found[component, layer].delta - expected[component, layer]).square().sum())
            assert difference == pytest.approx(lost, rel=1e-4, abs=1e-10 * norm)
            assert found[component, layer].down.shape[0] == rank
        total = (sum(lost for _, lost in own.values()) / sum(norm for norm, _ in own.values())) ** 0.5
        worst = max(own, key=lambda layer: own[layer][1] / own[layer][0])
        line = re.search(rf"^{component}: relative error (\S+), (\S+) in (\S+)$", printed, re.MULTILINE)
        assert line is not None
        assert float(line.group(1)) == pytest.approx(total, rel=5e-3)
        assert float(line.group(2)) == pytest.approx((own[worst][1] / own[worst][0]) ** 0.5, rel=5e-3)
        assert line.group(3) == worst


def test_a_rank_that_suffices_loses_nothing_but_rounding(
    family: Family, two: tuple[Path, Path, Layers, Layers], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, _, _ = two
    merged(tmp_path / "c", str(a), str(b), "--rank", "64")
    errors = [float(number) for number in re.findall(r"relative error (\S+),", capsys.readouterr().out)]
    assert len(errors) == len(family.components)
    assert max(errors) < 1e-6


@pytest.mark.parametrize("options", [(), ("--rank", "5")])
def test_convolutions_are_merged_too(tmp_path: Path, options: tuple[str, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    key = ("unet", "down_blocks.0.resnets.0.conv1")

    def layer(rank: int) -> Layer:
        down = torch.randn(rank, 6, 3, 3, generator=generator)
        return Layer(down, torch.randn(8, rank, 1, 1, generator=generator), 2.0)

    one, other = {key: layer(2)}, {key: layer(3)}
    metadata = layout_of("sdxl").metadata
    a, b = (save_universal(tmp_path / f"{n}", "sdxl", layers, metadata) for n, layers in enumerate((one, other)))
    found = read_layers(merged(tmp_path / "c", f"{a}:2", f"{b}:0.5", *options), "sdxl", one)[key]
    assert (found.down.shape, found.up.shape) == ((5, 6, 3, 3), (8, 5, 1, 1))
    torch.testing.assert_close(found.delta, weighted_sum((2, one), (0.5, other))[key], rtol=1e-5, atol=1e-5)


def test_one_file_merged_alone_is_itself_at_another_strength(
    family: Family, two: tuple[Path, Path, Layers, Layers], tmp_path: Path
) -> None:
    a, _, one, _ = two
    found = read_layers(merged(tmp_path / "c", f"{a}:-2"), family.name, one)
    for key, layer in one.items():
        assert bool(((found[key].delta + 2 * layer.delta).abs() <= 2**-23 * layer.magnitude).all())


def test_layers_of_zeros_that_a_conversion_added_are_not_merged(
    model: str, family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = random_layers(model, alpha=4.0, chosen=lambda layer: layer.endswith("q_proj"))
    source = save_universal(tmp_path / "a", family.name, layers, layout_of(family.name).metadata)
    assert main(["convert", str(source), str(tmp_path / "b.safetensors"), "--to", "diffusers"]) == 0
    capsys.readouterr()
    between = str(tmp_path / "b.safetensors")
    assert contents(merged(tmp_path / "c", between)) == contents(merged(tmp_path / "d", str(source)))
    assert "layers of zeros added" in capsys.readouterr().err
    everything = {(c, name.replace("q_proj", "k_proj")): one for (c, name), one in layers.items()} | layers
    assert read_layers(merged(tmp_path / "e", between, "--to", "peft"), "", everything).keys() == layers.keys()


def test_a_merge_says_what_it_was_made_of(
    family: Family, two: tuple[Path, Path, Layers, Layers], tmp_path: Path
) -> None:
    a, b, _, _ = two
    for path, phrase in ((a, "an owl"), (b, "a „cat“")):
        save_file(load_file(path), path, {**metadata_of(path), "modelspec.trigger_phrase": phrase})
    found = metadata_of(merged(tmp_path / "c", f"{a}:0.8", str(b)))
    assert json.loads(found["lora_forge_merge"]) == {
        "format": 1,
        "files": [{"name": "a.safetensors", "weight": 0.8}, {"name": "b.safetensors", "weight": 1.0}],
        "rank": None,
    }
    assert found["modelspec.trigger_phrase"] == "an owl, a „cat“"
    assert found.items() >= layout_of(family.name).metadata.items()
    assert (found["ss_network_module"], found["ss_network_dim"]) == ("networks.lora", "6")
    assert found["modelspec.title"] == "0.8 · a + 1 · b"
    assert found["modelspec.description"] == "merged from a.safetensors × 0.8, b.safetensors × 1"
    assert json.loads(found["ss_tag_frequency"]) == {"a": {"an owl": 1}, "b": {"a „cat“": 1}}
    assert not [text for text in found.values() if str(tmp_path) in text]


def test_a_merge_has_the_prompts_of_runs_and_the_commonest_tags_of_others(
    two: tuple[Path, Path, Layers, Layers], tmp_path: Path
) -> None:
    a, b, _, _ = two
    many = {f"tag {number}": number for number in range(1, 300)}
    tags = {"10_owls": many, "5_more": {"tag 7": 1000}}
    run = json.dumps({"run": {"prompt": "a bear"}})
    base = {"ss_sd_model_name": "somebody/model"}
    for path, told in ((a, {"ss_tag_frequency": json.dumps(tags)}), (b, {"lora_forge": run, "ss_tag_frequency": "[["})):
        save_file(load_file(path), path, {**metadata_of(path), **told, **base})
    found = metadata_of(merged(tmp_path / "c", str(a), str(b)))
    assert found["modelspec.trigger_phrase"] == "a bear"
    assert found["ss_sd_model_name"] == "somebody/model"
    joined = json.loads(found["ss_tag_frequency"])
    assert joined["b"] == {"a bear": 1}
    assert list(joined["a"].items())[:2] == [("tag 7", 1007), ("tag 299", 299)]
    assert len(joined["a"]) == 100


def test_a_path_may_have_colons_and_a_weight_has_to_be_a_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = random_layers("tiny_sd15", alpha=4.0)
    source = save_universal(tmp_path / "a:2", "sd15", layers)
    found = read_layers(merged(tmp_path / "b", str(source)), "sd15", layers)
    assert all(torch.equal(found[key].delta, one.delta) for key, one in layers.items())
    found = read_layers(merged(tmp_path / "c", f"{source}:2"), "sd15", layers)
    assert all(torch.equal(found[key].delta, 2 * one.delta) for key, one in layers.items())
    assert "'much', which is no number" in refused(capsys, "merge", f"{source}:much", "-o", tmp_path / "d")
    assert "missing:3" in refused(capsys, "merge", "missing:3:x", "-o", tmp_path / "d")


@pytest.mark.parametrize("weight", ["0", "nan", "inf", "-inf", "1e999"])
def test_a_weight_that_makes_no_sense_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], weight: str
) -> None:
    source = save_universal(tmp_path / "a", "sd15", random_layers("tiny_sd15", alpha=4.0))
    assert "makes no sense" in refused(capsys, "merge", f"{source}:{weight}", "-o", tmp_path / "b")
    assert list(tmp_path.iterdir()) == [source]


def test_what_does_not_belong_together_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sd15 = save_universal(tmp_path / "sd15", "sd15", random_layers("tiny_sd15", alpha=4.0))
    sdxl = save_universal(tmp_path / "sdxl.safetensors", "sdxl", random_layers("tiny_sdxl", alpha=4.0))
    layers = random_layers("tiny_sd15", alpha=4.0)
    wide = save_universal(
        tmp_path / "wide.safetensors",
        "sd15",
        {key: one._replace(down=torch.ones(4, 99)) for key, one in layers.items()},
    )
    before = sorted(tmp_path.iterdir())
    error = refused(capsys, "merge", sd15, sdxl, "-o", tmp_path / "out")
    assert "different families" in error
    assert str(sd15) in error
    assert str(sdxl) in error
    error = refused(capsys, "merge", sd15, wide, "-o", tmp_path / "out")
    assert re.search(r"text_encoder\.text_model\S+ is \[40, 99\] and not \[40, 40\]", error)
    assert "input" in refused(capsys, "merge", sd15, sdxl, "-o", sdxl, "--overwrite")
    assert "exists" in refused(capsys, "merge", sd15, "-o", wide)
    unknown: dict[str, Any] = {**load_file(sd15), "what": torch.ones(1)}
    save_file(unknown, wide)
    error = refused(capsys, "merge", sd15, wide, "-o", tmp_path / "out")
    assert "'what'; convert --drop-unknown leaves them out" in error
    assert sorted(tmp_path.iterdir()) == before


def test_numbers_that_overflow_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers = random_layers("tiny_sd15", alpha=4.0)
    source = save_universal(tmp_path / "a", "sd15", {k: one._replace(up=one.up * 1e36) for k, one in layers.items()})
    for weight, options in (("1e9", ()), ("1e300", ()), ("1e9", ("--rank", "2")), ("1e300", ("--rank", "2"))):
        error = refused(capsys, "merge", f"{source}:{weight}", "-o", tmp_path / "b", *options)
        assert "text_encoder.text_model." in error
        assert "beyond float32" in error
    assert list(tmp_path.iterdir()) == [source]
