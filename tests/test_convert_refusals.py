"""What `lora-forge convert` refuses: clearly, naming keys, and with nothing written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from layer_files import (
    assert_same_delta,
    contents,
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


def converted(source: Path, output: Path, format: str, *options: str) -> Path:
    assert main(["convert", str(source), str(output), "--to", format, *options]) == 0
    return named(output, format)


UNMAPPED: dict[str, dict[str, torch.Tensor]] = {
    "in no spelling": {"lora_unet_unet_down_blocks_0_attentions_0_proj_in_lora_down.weight": torch.ones(4, 4)},
    "no layer of the family": {
        "lora_unet_foo.lora_down.weight": torch.ones(4, 4),
        "lora_unet_foo.lora_up.weight": torch.ones(4, 4),
    },
    "an alpha alone": {"lora_unet_conv_in.alpha": torch.tensor(1.0)},
    "textual inversion": {"<s1>": torch.ones(4)},
    "LoHa": {
        f"lora_unet_mid_block_attentions_0_proj_in.hada_w{n}": torch.ones(4, 4) for n in ("1_a", "1_b", "2_a", "2_b")
    },
    "LoKr": {f"lora_unet_mid_block_attentions_0_proj_in.lokr_w{n}": torch.ones(4, 4) for n in (1, 2)},
    "DoRA": {
        "lora_unet_mid_block_attentions_0_proj_in.dora_scale": torch.ones(4, 1),
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(4, 4),
        "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.ones(4, 4),
    },
    "Tucker": {
        "lora_unet_mid_block_resnets_0_conv1.lora_mid.weight": torch.ones(4, 4, 3, 3),
        "lora_unet_mid_block_resnets_0_conv1.lora_down.weight": torch.ones(4, 4, 1, 1),
        "lora_unet_mid_block_resnets_0_conv1.lora_up.weight": torch.ones(4, 4, 1, 1),
    },
    "a scalar": {
        "lora_unet_mid_block_resnets_0_conv1.scalar": torch.tensor(0.5),
        "lora_unet_mid_block_resnets_0_conv1.lora_down.weight": torch.ones(4, 4, 1, 1),
        "lora_unet_mid_block_resnets_0_conv1.lora_up.weight": torch.ones(4, 4, 1, 1),
    },
    "a whole weight": {"lora_unet_mid_block_attentions_0_norm.diff": torch.ones(4)},
}


@pytest.mark.parametrize("what", UNMAPPED)
def test_keys_that_cannot_be_mapped_are_refused_by_name_unless_they_are_to_be_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    layers = random_layers("tiny_sd15", alpha=4.0)
    source, output = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    clean = contents(save_universal(source, "sd15", layers))
    save_file({**load_file(source), **UNMAPPED[what]}, source)
    error = refused(capsys, "convert", source, output, "--to", "diffusers")
    assert all(key in error for key in UNMAPPED[what])
    assert "--drop-unknown" in error
    assert list(tmp_path.iterdir()) == [source]

    converted(source, output, "diffusers", "--drop-unknown")
    said = capsys.readouterr().err
    assert all(key in said for key in UNMAPPED[what])
    assert contents(converted(output, tmp_path / "c.safetensors", "safetensors")) == clean


Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
UNFIT: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], tuple[str, ...]]] = {
    "NaN": (lambda t: {f"{Q}.lora_up.weight": t[f"{Q}.lora_up.weight"] * float("nan")}, ("NaN", f"{Q}.lora_up")),
    "infinity": (lambda t: {f"{Q}.lora_down.weight": t[f"{Q}.lora_down.weight"] + float("inf")}, ("infinity",)),
    "alpha 0": (lambda t: {f"{Q}.alpha": torch.tensor(0.0)}, ("alpha is 0", f"{Q}.alpha")),
    "alpha NaN": (lambda t: {f"{Q}.alpha": torch.tensor(float("nan"))}, ("alpha is nan", f"{Q}.alpha")),
    "alpha of many": (lambda t: {f"{Q}.alpha": torch.ones(2)}, ("is not one number", f"{Q}.alpha")),
    "ranks that differ": (lambda t: {f"{Q}.lora_up.weight": torch.ones(16, 3)}, ("do not fit", f"{Q}.lora_up")),
    "half a pair": (lambda t: {f"{Q}x.lora_up.weight": torch.ones(16, 3)}, (f"{Q}x",)),
    "one dimension": (lambda t: {f"{Q}.lora_up.weight": torch.ones(16)}, ("do not fit", f"{Q}.lora_up")),
    "three dimensions": (
        lambda t: {f"{Q}.lora_up.weight": torch.ones(16, 4, 1), f"{Q}.lora_down.weight": torch.ones(4, 16, 1)},
        ("no linear layer's", f"{Q}.lora_up"),
    ),
    "nothing inside": (
        lambda t: {f"{Q}.lora_up.weight": torch.ones(16, 0), f"{Q}.lora_down.weight": torch.ones(0, 16)},
        (f"{Q}.lora_up",),
    ),
    "whole numbers": (lambda t: {f"{Q}.lora_up.weight": torch.ones(16, 4, dtype=torch.int8)}, ("I8", f"{Q}.lora_up")),
    "mixed formats": (
        lambda t: {f"unet.conv_in.lora_{m}.weight": torch.ones(4, 4) for m in "AB"},
        ("mixes formats", "unet.conv_in.lora_A.weight"),
    ),
    "a layer twice": (
        lambda t: {
            key.replace("down_blocks_0_attentions_0", "input_blocks_1_1"): tensor.clone()
            for key, tensor in t.items()
            if key.startswith(Q)
        },
        ("are the same layer", "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"),
    ),
}


@pytest.mark.parametrize("drop", [(), ("--drop-unknown",)])
@pytest.mark.parametrize("what", UNFIT)
def test_a_file_that_is_unfit_to_load_is_refused_and_the_key_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, drop: tuple[str, ...]
) -> None:
    source = save_universal(tmp_path / "a.safetensors", "sd15", random_layers("tiny_sd15", alpha=4.0))
    change, words = UNFIT[what]
    tensors = load_file(source)
    save_file({**tensors, **change(tensors)}, source)
    error = refused(capsys, "convert", source, tmp_path / "b.safetensors", "--to", "diffusers", *drop)
    assert all(word in error for word in words), error
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip, say, of a pickle", b"\x80\x02}q\x00." + b"\0" * 20])
def test_what_is_no_safetensors_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    refused(capsys, "convert", tmp_path / "a.safetensors", tmp_path / "b", "--to", "peft")
    refused(capsys, "convert", tmp_path / "missing.safetensors", tmp_path / "b", "--to", "peft")
    refused(capsys, "convert", tmp_path, tmp_path.parent / "b", "--to", "peft")
    assert [one.name for one in tmp_path.iterdir()] == ["a.safetensors"]


def test_layers_that_are_only_numbered_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "a.safetensors"
    save_file({"unet:0:down": torch.ones(4, 8), "unet:0:up": torch.ones(8, 4), "<s1>": torch.ones(4)}, source)
    error = refused(capsys, "convert", source, tmp_path / "b", "--to", "peft", "--drop-unknown")
    assert "only numbered, as 'unet:0' is" in error


def test_a_file_of_an_unknown_family_needs_to_be_told_its_family(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = random_layers("tiny_sdxl", alpha=None, chosen=lambda layer: layer.endswith("attn1.to_q"))
    source, output = save_diffusers(tmp_path / "a.safetensors", layers), tmp_path / "b.safetensors"
    assert "--family sd15 or sdxl" in refused(capsys, "convert", source, output, "--to", "safetensors")
    converted(source, output, "safetensors", "--family", "sdxl")
    assert_same_delta(read_layers(output, "sdxl", layers), layers)
    error = refused(capsys, "convert", output, tmp_path / "c", "--to", "peft", "--family", "sd15")
    assert "is a LoRA of sdxl, not of sd15" in error
    error = refused(capsys, "convert", source, tmp_path / "d", "--to", "peft", "--family", "sd51")
    assert "unknown backend 'sd51'; did you mean 'sd15'?" in error


@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_an_output_that_exists_is_replaced_only_when_asked_and_the_input_never(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str
) -> None:
    source = save_universal(tmp_path / "a.safetensors", "sd15", random_layers("tiny_sd15", alpha=4.0))
    output = converted(source, tmp_path / "b", format)
    before, inner = contents(output), contents(source)
    assert "--overwrite" in refused(capsys, "convert", source, output, "--to", format)
    converted(source, output, format, "--overwrite")
    assert contents(output) == before
    for same in (source, tmp_path / "." / "a.safetensors", tmp_path):
        error = refused(capsys, "convert", source, same, "--to", format, "--overwrite")
        assert "input" in error or (format == "peft" and "writes a folder, not .safetensors" in error)
    refused(capsys, "convert", output, output, "--to", format, "--overwrite")
    assert contents(source) == inner
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.safetensors", output.name]


def test_a_folder_that_holds_anything_but_adapters_is_never_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_universal(tmp_path / "a.safetensors", "sd15", random_layers("tiny_sd15", alpha=4.0))
    output = converted(source, tmp_path / "b", "peft")
    (output / "unet" / "thesis.txt").write_text("years of work")
    error = refused(capsys, "convert", source, output, "--to", "peft", "--overwrite")
    assert "holds adapters alone" in error
    (tmp_path / "file").write_text("no folder")
    assert "is not a folder" in refused(capsys, "convert", source, tmp_path / "file", "--to", "peft", "--overwrite")
    assert "is a directory" in refused(capsys, "convert", source, output, "--to", "diffusers", "--overwrite")
    assert (output / "unet" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_a_disk_that_refuses_leaves_nothing_and_the_old_output_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    from lora_forge.files import formats

    source = save_universal(tmp_path / "a.safetensors", "sd15", random_layers("tiny_sd15", alpha=4.0))
    output = converted(source, tmp_path / "b", format)
    before = contents(output)

    def full(path: Path, *rest: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(formats, "write_safetensors", full)
    error = refused(capsys, "convert", source, output, "--to", format, "--overwrite")
    assert "No space left on device" in error
    assert contents(output) == before
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.safetensors", output.name]


BROKEN_RECORDS = [
    "",
    "[]",
    "{}",
    "[" * 100_000,
    '{"format": 2, "original": "peft", "padded": [], "before": {}}',
    '{"format": 1, "original": "/etc/passwd", "padded": [], "before": {}}',
    '{"format": 1, "original": "peft", "padded": 3, "before": {}}',
    '{"format": 1, "original": "peft", "padded": [], "before": {"unet": {}}}',
    *(
        '{"format": 1, "original": "peft", "padded": [], "before": {"unet": '
        f'{{"alpha": {alpha}, "rank": 4, "alpha_dtype": "{dtype}", "widened": []}}}}}}'
        for alpha, dtype in (("0", "F32"), ("NaN", "F32"), ("1e999", "F32"), ("4", "U8"))
    ),
]


@pytest.mark.parametrize("record", BROKEN_RECORDS, ids=range(len(BROKEN_RECORDS)))
def test_a_record_that_no_conversion_wrote_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], record: str
) -> None:
    layers = random_layers("tiny_sd15", alpha=None)
    metadata = {**layout_of("sd15").metadata, "lora_forge_convert": record}
    source = save_diffusers(tmp_path / "a.safetensors", layers, metadata)
    error = refused(capsys, "convert", source, tmp_path / "b", "--to", "peft")
    assert "'lora_forge_convert' is not what a conversion writes" in error


def test_a_record_that_no_longer_fits_its_file_changes_nothing(tmp_path: Path) -> None:
    layers = random_layers("tiny_sd15", rank=4, alpha=None)
    before = {"unet": {"alpha": 16.0, "rank": 8, "alpha_dtype": "F32", "widened": []}}
    record = {"format": 1, "original": "safetensors", "padded": ["unet.conv_in"], "before": before}
    metadata = {**layout_of("sd15").metadata, "lora_forge_convert": json.dumps(record)}
    source = save_diffusers(tmp_path / "a.safetensors", layers, metadata)
    output = converted(source, tmp_path / "b.safetensors", "safetensors")
    assert_same_delta(read_layers(output, "sd15", layers), layers)


def test_a_file_gets_the_suffix_that_its_readers_want_and_a_folder_of_such_a_name_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_universal(tmp_path / "a.safetensors", "sd15", random_layers("tiny_sd15", alpha=4.0))
    for name, written in (("plain", "plain.safetensors"), ("v1.5", "v1.5.safetensors"), ("b.safetensors", None)):
        assert main(["convert", str(source), str(tmp_path / name), "--to", "diffusers"]) == 0
        path = tmp_path / (written or name)
        assert capsys.readouterr().out.startswith(f"{path}: kohya → diffusers, ")
        assert path.is_file()
    before = sorted(tmp_path.iterdir())
    error = refused(capsys, "convert", source, tmp_path / "c.safetensors", "--to", "peft")
    assert "--to peft writes a folder, not .safetensors; give the name without .safetensors" in error
    assert "not .ckpt" in refused(capsys, "convert", source, tmp_path / "c.ckpt", "--to", "safetensors")
    assert "not .bin" in refused(capsys, "merge", source, "-o", tmp_path / "c.bin", "--to", "peft")
    assert "'s3://loras/c' is a URL" in refused(capsys, "convert", source, "s3://loras/c", "--to", "diffusers")
    assert sorted(tmp_path.iterdir()) == before


def test_kohya_is_what_inspect_and_convert_call_it_and_convert_says_what_to_ask_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_diffusers(tmp_path / "a.safetensors", random_layers("tiny_sd15", alpha=4.0))
    output = tmp_path / "b.safetensors"
    assert "give --to safetensors" in refused(capsys, "convert", source, output, "--to", "kohya")
    assert "'kohya_ss' is not one of" in refused(capsys, "convert", source, output, "--to", "kohya_ss")
    assert main(["convert", str(source), str(output), "--to", "safetensors", "--family", "sd15"]) == 0
    assert f"{output}: diffusers → kohya, " in capsys.readouterr().out
    assert main(["merge", str(output), "-o", str(tmp_path / "c")]) == 0
    assert f"{tmp_path / 'c.safetensors'}: kohya, " in capsys.readouterr().out
    assert main(["inspect", "--headers", str(output)]) == 0
    assert re.search(r"format +│ kohya ", capsys.readouterr().out)
