"""`lora-forge inspect`: what it says of anybody's file, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from docs_pages import DOCS
from lora_files import CONV, Q_PROJ, TO_K, entry, numbers, pair, raw, saved, small_sdxl
from refusals import refused

import lora_forge
from lora_forge.cli.inspect import command
from lora_forge.cli.main import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def shown(capsys: Capture, *arguments: str | Path, error: str = "") -> str:
    """What is printed, its lines without frames: cells with two spaces between them. error: what it ends with."""
    capsys.readouterr()
    assert main(["inspect", *map(str, arguments)]) == (2 if error else 0)
    printed = capsys.readouterr()
    assert printed.err == (f"lora-forge: error: {error}\n" if error else "")
    lines = (re.sub(r"\s*[│┃]\s*", "  ", line).strip() for line in printed.out.splitlines())
    return "\n".join(lines)


def answered(capsys: Capture, *arguments: str | Path) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["inspect", "--json", *map(str, arguments)]) == 0
    answer: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return answer


def test_a_file_is_told_in_tables(tmp_path: Path, capsys: Capture) -> None:
    tensors = small_sdxl()
    tensors[f"{TO_K}.lora_up.weight"].zero_()
    text = shown(capsys, saved(tmp_path / "a.safetensors", tensors, {"ss_tag_frequency": "x" * 500}))
    for line in (
        "format  kohya",
        "base model  sdxl",
        "numbers  F32 (×8)",
        "do nothing  1 of 4 layers: their ΔW is zero",
        "text_encoder_2  layers 0–3  1",
        f"ss_tag_frequency  {'x' * 72}… (500 characters)",
    ):
        assert line in text
    assert re.search(r"^unet  2  lora  2  1  [\d.]+  [\d.]+$", text, re.MULTILINE)
    assert re.search(r"^unet  down_blocks.0  1  [\d.]+  [\d.]+  –\ndown_blocks.1  1  0  –  1$", text, re.MULTILINE)
    assert f"{os.stat(tmp_path / 'a.safetensors').st_size} bytes" in text


def test_layers_lists_every_layer_and_all_metadata(tmp_path: Path, capsys: Capture) -> None:
    metadata = {f"key{number}": "x" * 100 for number in range(30)}
    path = saved(tmp_path / "a.safetensors", small_sdxl(), metadata)
    assert "10 more; --layers or --json have all" in shown(capsys, path)
    text = shown(capsys, path, "--layers")
    assert "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k  lora  2  1  [4, 7]" in text
    assert "down_blocks.0.resnets.0.conv1  lora  2  1  [4, 27]" in text
    assert text.count("x" * 100) == 30


def test_json_has_everything_for_programs(tmp_path: Path, capsys: Capture) -> None:
    path = saved(tmp_path / "a.safetensors", {**small_sdxl(), "odd": torch.ones(1)}, {"a": "b" * 500})
    (record,) = answered(capsys, path)
    assert {key: record[key] for key in ("path", "format", "family", "measured", "metadata", "unknown_keys")} == {
        "path": str(path),
        "format": "kohya",
        "family": "sdxl",
        "measured": True,
        "metadata": {"a": "b" * 500},
        "unknown_keys": ["odd"],
    }
    assert record["size"] == path.stat().st_size
    layers = {layer["name"]: layer for layer in record["layers"]}
    assert layers[CONV]["shape"] == [4, 27]
    tensors = small_sdxl()
    delta = 0.5 * tensors[f"{TO_K}.lora_up.weight"] @ tensors[f"{TO_K}.lora_down.weight"]
    assert layers[TO_K]["delta_norm"] == pytest.approx(float(delta.norm()), rel=1e-5)
    (unet,) = [one for one in record["components"] if one["component"] == "unet"]
    together = math.hypot(layers[CONV]["delta_norm"], layers[TO_K]["delta_norm"])
    assert (unet["layers"], unet["ranks"]) == (2, [{"value": 2, "layers": 2}])
    assert unet["delta_norm"] == pytest.approx(together)


def test_the_record_of_our_own_run_is_summed_up(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "owl.safetensors"
    lora_forge.run("a steampunk owl", "tiny_sdxl", iterations=2, seed=7, output=file)
    text = shown(capsys, file)
    assert "the run that made it" in text
    assert "prompt  a steampunk owl" in text
    assert "objective  1 × embedding_magnitude" in text
    assert "seed  7" in text
    assert f"torch {torch.__version__}" in text
    assert '"conditioning_shift"' not in text
    assert "do nothing  136 of 164 layers" in text


@pytest.mark.parametrize(
    "record", ["", "{", "[]", "7", '{"run": 7}', '{"run": {"loss": [7]}}', '{"effect": []}', "[" * 50_000]
)
def test_a_record_that_is_not_ours_is_shown_as_metadata(tmp_path: Path, capsys: Capture, record: str) -> None:
    text = shown(capsys, saved(tmp_path / "a.safetensors", small_sdxl(), {"lora_forge": record}))
    assert "the run that made it" not in text
    assert f"lora_forge  {record[:40]}".strip() in text


def test_headers_reads_no_tensor(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("lora_forge.inspection.layers.read_array", read)
    path = saved(tmp_path / "a.safetensors", small_sdxl())
    text = shown(capsys, path, "--headers")
    assert "not read  tensors" in text
    assert "unet  2  lora  2  not read" in text
    (record,) = answered(capsys, path, "--headers")
    assert not record["measured"]
    assert {layer["delta_norm"] for layer in record["layers"]} == {None}


def test_a_file_of_a_gigabyte_is_listed_from_its_header(tmp_path: Path, capsys: Capture) -> None:
    layers, header, place = 700, {}, 0
    for number in range(layers):
        for part, shape in (("down", [128, 1460]), ("up", [1460, 128])):
            end = place + 4 * math.prod(shape)
            header[f"lora_te2_layers_{number}.lora_{part}.weight"] = entry(place, end, shape=shape)
            place = end
    path = raw(tmp_path / "large.safetensors", header)
    os.truncate(path, path.stat().st_size + place)  # a sparse file: nothing of it is on the disk
    assert place > 10**9
    text = shown(capsys, path, "--headers")
    assert f"size  {path.stat().st_size / 1e6:.1f} MB" in text
    assert f"text_encoder_2  {layers}  lora  128" in text


def test_several_files_are_told_one_after_the_other(tmp_path: Path, capsys: Capture) -> None:
    one = saved(tmp_path / "one.safetensors", small_sdxl())
    two = saved(tmp_path / "two.safetensors", pair("unet.a", 3, 4))
    text = shown(capsys, one, two)
    assert text.index("one.safetensors") < text.index("two.safetensors")
    assert [Path(record["path"]).name for record in answered(capsys, one, two)] == [
        "one.safetensors",
        "two.safetensors",
    ]


def test_one_file_that_is_refused_does_not_keep_the_others_from_being_told(tmp_path: Path, capsys: Capture) -> None:
    good = saved(tmp_path / "good.safetensors", small_sdxl())
    bad, page = raw(tmp_path / "bad.safetensors", "{nonsense"), tmp_path / "page.html"
    missing = tmp_path / "missing.safetensors"
    assert main(["inspect", *map(str, (bad, good, missing, "--html", page))]) == 2
    printed = capsys.readouterr()
    assert "text_encoder_2" in printed.out
    assert printed.err.count("\n") == 3
    assert printed.err.startswith("lora-forge: error: 2 files\n")
    assert "bad.safetensors" in printed.err
    assert "missing.safetensors" in printed.err
    assert not page.exists()
    assert main(["inspect", "--json", str(bad), str(good)]) == 2
    assert [record["path"] for record in json.loads(capsys.readouterr().out)] == [str(good)]


UNFIT = {
    "a rank that differs": (
        pair(TO_K, 4, 5) | {f"{TO_K}.lora_up.weight": numbers(4, 3)},
        f"'{TO_K}.lora_down.weight' [2, 5] and '{TO_K}.lora_up.weight' [4, 3] do not fit together",
    ),
    "half a layer": ({f"{TO_K}.lora_down.weight": numbers(2, 5)}, f"'{TO_K}.lora_down.weight' has no up beside it"),
    "a vector": (
        pair(TO_K, 4, 5) | {f"{TO_K}.lora_up.weight": numbers(4)},
        f"and '{TO_K}.lora_up.weight' [4] do not fit together",
    ),
    "half a factor": (
        {f"{TO_K}.hada_w1_a": numbers(4, 2), f"{TO_K}.hada_w1_b": numbers(2, 4), f"{TO_K}.hada_w2_a": numbers(4, 2)},
        f"'{TO_K}.hada_w1_a' has no hada_w2_b beside it",
    ),
    "factors that differ": (
        {f"{TO_K}.lokr_w1": numbers(2, 2), f"{TO_K}.lokr_w2_a": numbers(4, 2), f"{TO_K}.lokr_w2_b": numbers(3, 4)},
        f"'{TO_K}.lokr_w2_a' [4, 2] and '{TO_K}.lokr_w2_b' [3, 4] do not fit together",
    ),
    "a factor that is none": (
        {f"{TO_K}.lokr_w1": numbers(2), f"{TO_K}.lokr_w2": numbers(2, 3)},
        f"'{TO_K}.lokr_w1' [2] is no matrix",
    ),
    "two formats": (
        pair(TO_K, 4, 5)
        | {"unet.mid_block.a.lora_A.weight": numbers(2, 3), "unet.mid_block.a.lora_B.weight": numbers(3, 2)},
        f"'{Q_PROJ}.lora_down.weight' is kohya, 'unet.mid_block.a.lora_A.weight' is diffusers",
    ),
    "two names for one layer": (
        pair(TO_K, 4, 5) | pair("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", 4, 5),
        "are the same layer",
    ),
}


@pytest.mark.parametrize("headers", [True, False])
@pytest.mark.parametrize("how", UNFIT)
def test_a_file_that_no_reader_can_load_is_told_and_refused(
    tmp_path: Path, capsys: Capture, how: str, headers: bool
) -> None:
    tensors, words = UNFIT[how]
    path, page = saved(tmp_path / "a.safetensors", {**pair(Q_PROJ, 3, 4), **tensors}), tmp_path / "page.html"
    options = ["--headers"] if headers else []
    assert main(["inspect", str(path), "--html", str(page), *options]) == 2
    printed = capsys.readouterr()
    assert "a.safetensors' is no whole LoRA: " in printed.err
    assert words in printed.err
    assert printed.err.count("\n") == 1
    assert words in printed.out
    assert not page.exists()


def test_what_is_wrong_with_weights_alone_is_told_and_not_refused(tmp_path: Path, capsys: Capture) -> None:
    tensors = pair(TO_K, 4, 5) | pair(Q_PROJ, 4, 5, alpha=0.0)
    tensors[f"{TO_K}.lora_up.weight"][1, 1] = math.nan
    path = saved(tmp_path / "a.safetensors", tensors)
    text = shown(capsys, path)
    assert f"wrong: '{TO_K}.lora_up.weight' holds NaN" in text
    assert f"wrong: '{Q_PROJ}': alpha is 0" in text
    (record,) = answered(capsys, path)
    assert {layer["name"]: layer["delta_norm"] for layer in record["layers"]} == {TO_K: None, Q_PROJ: 0}


def test_json_is_json_whatever_a_file_holds(tmp_path: Path, capsys: Capture) -> None:
    header = {
        "__metadata__": {"\ud800": "\udfff"},
        "unet.\ud800\x1b.alpha": entry(0, 4, shape=[]),
        "unet.\u202e.lora_A.weight": entry(4, 8, shape=[1, 1]),
        "unet.\u202e.lora_B.weight": entry(8, 12, shape=[1, 1]),
    }
    path = raw(tmp_path / "a.safetensors", header, torch.tensor([math.nan, math.inf, 1]).numpy().tobytes())
    assert main(["inspect", "--json", str(path)]) == 0
    text = capsys.readouterr().out
    assert json.loads(text, parse_constant=pytest.fail)[0]["metadata"] == {"\ud800": "\udfff"}


def test_nothing_of_a_file_steers_the_terminal_or_is_read_as_markup(tmp_path: Path, capsys: Capture) -> None:
    evil = "[red]x[/red]\x1b[31m\u202e\n"
    tensors = {
        f"unet.{evil}.lora_A.weight": numbers(2, 2),
        f"unet.{evil}.lora_B.weight": numbers(2, 2),
        evil: numbers(1),
    }
    path = saved(tmp_path / "a.safetensors", tensors, {evil: evil, "lora_forge": json.dumps({"run": {"prompt": evil}})})
    for options in ([], ["--layers"], ["--headers"]):
        text = shown(capsys, path, *options)
        assert "[red]x[/red]" in text
        assert not {"\x1b", "\u202e"} & set(text)


def test_a_path_in_the_metadata_is_never_followed(tmp_path: Path, capsys: Capture) -> None:
    text = shown(capsys, saved(tmp_path / "a.safetensors", small_sdxl(), {"ss_output_name": "../../escape"}))
    assert "ss_output_name  ../../escape" in text
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_layers_known_by_number_alone_are_told(tmp_path: Path, capsys: Capture) -> None:
    tensors: dict[str, torch.Tensor] = {"<s1>": numbers(768)}
    for component, count, width in (("text_encoder", 48, 768), ("unet", 144, 320)):
        for number in range(count):
            tensors[f"{component}:{number}:down"] = numbers(1, 768 if number % 9 == 5 else width)
            tensors[f"{component}:{number}:up"] = numbers(width, 1)
    text = shown(capsys, saved(tmp_path / "a.safetensors", tensors))
    assert "format  cloneofsimo" in text
    assert "base model  sd15" in text
    assert "unknown keys  1: <s1>" in text
    assert re.search(r"^unet  numbered layers  144  ", text, re.MULTILINE)


def test_an_alpha_of_no_layer_beside_numbered_layers_breaks_nothing(tmp_path: Path, capsys: Capture) -> None:
    tensors = {f"unet:0:{part}": numbers(1, 1) for part in ("up", "down")} | {"unet:0:up.alpha": numbers(1)}
    (record,) = answered(capsys, saved(tmp_path / "a.safetensors", tensors), "--headers")
    assert record["format"] == "cloneofsimo"


def test_a_prefix_that_is_doubled_makes_no_layer_of_it(tmp_path: Path, capsys: Capture) -> None:
    start = "lora_unet_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k_lora"
    tensors = {f"{start}_down.weight": numbers(2, 3), f"{start}_up.weight": numbers(3, 2)}
    path = saved(tmp_path / "a.safetensors", tensors)
    text = shown(capsys, path, error=f"{str(path)!r} is no LoRA: there is no LoRA layer among its 2 tensors")
    assert "format  none: there is no LoRA layer in it" in text
    assert f"unknown keys  2: {start}_down.weight" in text


def test_a_checkpoint_is_told_to_be_no_lora_and_refused(tmp_path: Path, capsys: Capture) -> None:
    names = ("model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.embeddings.weight")
    path = saved(tmp_path / "model.safetensors", {name: numbers(4, 4) for name in names})
    error = f"{str(path)!r} is no LoRA: there is no LoRA layer among its 2 tensors"
    for options in ([], ["--headers"], ["--html", tmp_path / "page.html"]):
        assert "unknown keys  2: " in shown(capsys, path, *options, error=error)
    assert main(["inspect", "--json", str(path)]) == 2
    (record,) = json.loads(capsys.readouterr().out)
    assert (record["format"], record["layers"]) == ("none", [])
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("name", "width", "metadata", "family"),
    [
        ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", 768, {}, "sd15"),
        ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", 1024, {}, "sd2"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", 2048, {}, "sdxl"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k", 640, {}, None),
        ("lora_unet_x", 640, {"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
        ("lora_unet_x", 640, {"modelspec.architecture": "stable-diffusion-v1/lora"}, "sd15"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", 1024, {}, "sd2"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", 768, {}, "sd15"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", 768, {}, "sdxl"),
    ],
)
def test_the_base_family_is_told_by_sizes_names_or_metadata(
    tmp_path: Path, capsys: Capture, name: str, width: int, metadata: dict[str, str], family: str | None
) -> None:
    path = saved(tmp_path / "a.safetensors", pair(name, 8, width), metadata)
    assert answered(capsys, path, "--headers")[0]["family"] == family


def test_a_page_that_exists_is_kept_unless_it_may_be_replaced(tmp_path: Path, capsys: Capture) -> None:
    path, page = saved(tmp_path / "a.safetensors", small_sdxl()), tmp_path / "page.html"
    page.write_text("mine")
    assert "--overwrite replaces it" in refused(capsys, "inspect", path, "--html", page)
    assert page.read_text() == "mine"
    assert f"page: {page}" in shown(capsys, path, "--html", page, "--overwrite")
    assert page.read_text().startswith("<!doctype html>")


def test_a_page_never_replaces_the_file_it_is_about(tmp_path: Path, capsys: Capture) -> None:
    path = saved(tmp_path / "a.safetensors", small_sdxl())
    before = path.read_bytes()
    assert "holds the input" in refused(capsys, "inspect", path, "--html", path, "--overwrite")
    assert path.read_bytes() == before


def test_listing_headers_imports_nothing_heavy(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", small_sdxl())
    script = (
        "import sys; from lora_forge.cli.main import main; code = main(sys.argv[1:]);"
        "print(code, {'torch', 'numpy', 'safetensors', 'plotly', 'jinja2', 'diffusers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "inspect", "--headers", str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 set()"


def test_every_option_of_inspect_is_on_its_page() -> None:
    text = (DOCS / "inspect.md").read_text(encoding="utf-8")
    options = [name for parameter in command.params for name in parameter.opts if name.startswith("-")]
    assert len(options) > 4
    assert [name for name in options if f"`{name}" not in text] == []
