"""Headers of LoRA files: checked whole before anything else is read, refused in one line that names the key."""

from __future__ import annotations

import json
import os
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import Q_PROJ, entry, raw, saved, small_sdxl
from refusals import refused
from tiny_models import layout_of

from lora_forge.errors import LoraFileError
from lora_forge.files.header import LARGEST_HEADER, read_header
from lora_forge.files.lora_file import open_lora
from lora_forge.files.names import universal_name
from lora_forge.files.spelling import read_name

DATA = Path(__file__).parent / "data"
COMPONENTS = {"sdxl": {"unet", "text_encoder", "text_encoder_2"}, "sd15": {"unet", "text_encoder"}}
DOWN = f"{Q_PROJ}.lora_down.weight"

BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "is not a safetensors file"),
    "seven bytes": (lambda p: p.write_bytes(b"1234567"), "is not a safetensors file"),
    "header larger than the file": (lambda p: raw(p, "{}", length=1000), "cut off within its header"),
    "length beyond all": (lambda p: raw(p, "{}", length=2**64 - 1), "cut off within its header"),
    "no JSON": (lambda p: raw(p, "{nonsense}"), "its header is not JSON"),
    "no UTF-8": (lambda p: raw(p, b'{"\xff": 1}'), "its header is not JSON"),
    "UTF-16": (lambda p: raw(p, "{}".encode("utf-16")), "its header is not JSON"),
    "a list": (lambda p: raw(p, "[]"), "its header is not an object"),
    "nested without end": (lambda p: raw(p, '{"a":' * 100_000), "its header is not JSON"),
    "a number without end": (lambda p: raw(p, '{"a": ' + "9" * 10_000 + "}"), "its header is not JSON"),
    "metadata that is no text": (lambda p: raw(p, {"__metadata__": {"a": 1}}), "its metadata is not text"),
    "metadata that is a list": (lambda p: raw(p, {"__metadata__": ["a"]}), "its metadata is not text"),
    "no shape": (lambda p: raw(p, {DOWN: {"dtype": "F32", "data_offsets": [0, 0]}}), f"'{DOWN}' is not described"),
    "an unknown dtype": (lambda p: raw(p, {DOWN: entry(0, 4, dtype="F31")}, b"1234"), f"'{DOWN}' is of an unknown"),
    "a negative shape": (lambda p: raw(p, {DOWN: entry(0, 4, shape=[-1, -1])}, b"1234"), f"'{DOWN}' has a shape"),
    "a shape of text": (lambda p: raw(p, {DOWN: {**entry(0, 4), "shape": "1"}}, b"1234"), f"'{DOWN}' has a shape"),
    "a shape of truth": (lambda p: raw(p, {DOWN: {**entry(0, 4), "shape": [True]}}, b"1234"), f"'{DOWN}' has a shape"),
    "another size": (lambda p: raw(p, {DOWN: entry(0, 4, shape=[2])}, b"1234"), f"'{DOWN}' has another size"),
    "an overlap": (
        lambda p: raw(p, {"a": entry(0, 8), DOWN: entry(4, 12)}, bytes(12)),
        f"'{DOWN}' overlaps another",
    ),
    "out of range": (lambda p: raw(p, {DOWN: entry(0, 400)}, bytes(12)), f"'{DOWN}' ends beyond the file"),
    "a gap": (lambda p: raw(p, {"a": entry(0, 4), DOWN: entry(8, 12)}, bytes(12)), f"'{DOWN}' does not follow"),
    "too much": (lambda p: raw(p, {DOWN: entry(0, 4)}, bytes(12)), "8 bytes of it belong to no tensor"),
    "a key twice": (
        lambda p: raw(p, f'{{"{DOWN}": {json.dumps(entry(0, 4))}, "{DOWN}": {json.dumps(entry(4, 8))}}}', bytes(8)),
        f"the key '{DOWN}' is there twice",
    ),
    "metadata twice": (lambda p: raw(p, '{"__metadata__": {}, "__metadata__": {}}'), "'__metadata__' is there twice"),
    "one tensor in two spellings": (
        lambda p: raw(p, {"unet.a.lora_A.weight": entry(0, 4), "unet.a.lora_A.default.weight": entry(4, 8)}, bytes(8)),
        "'unet.a.lora_A.weight' and 'unet.a.lora_A.default.weight' are the same tensor",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_header_is_refused_in_one_line_that_names_the_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    make, words = BROKEN[how]
    path = tmp_path / "broken.safetensors"
    make(path)
    for arguments in ((), ("--headers",), ("--json",), ("--html", tmp_path / "page.html")):
        error = refused(capsys, "inspect", path, *arguments)
        assert words in error
        assert "broken.safetensors" in error
        assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole.safetensors", small_sdxl(), {"a": "b"}).read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in range(0, len(whole), 7):
        cut.write_bytes(whole[:length])
        with pytest.raises(LoraFileError):
            read_header(cut)


@pytest.mark.parametrize("size", [LARGEST_HEADER + 1, 100 * 2**20, 2**40])
def test_a_header_of_100_megabytes_is_refused_before_it_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    path = raw(tmp_path / "huge.safetensors", "{}", length=size)
    os.truncate(path, size + 8)  # no more of it is on the disk than was written
    tracemalloc.start()
    try:
        assert "is too large to be a LoRA's" in refused(capsys, "inspect", path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


class Payload:
    """Opens a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def test_a_pickle_is_refused_and_never_unpickled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bait = tmp_path / "was_unpickled"
    plain, zipped = tmp_path / "plain.safetensors", tmp_path / "zipped.pt"
    plain.write_bytes(pickle.dumps(Payload(bait)))
    torch.save({"a": Payload(bait)}, zipped)
    assert zipfile.is_zipfile(zipped)
    for path in (plain, zipped):
        assert "it looks like a pickle, which is never read" in refused(capsys, "inspect", path)
    assert not bait.exists()


def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder").mkdir()
    assert "is not a regular file" in refused(capsys, "inspect", tmp_path / "pipe.safetensors")
    assert "is not a regular file" in refused(capsys, "inspect", "/dev/zero")
    assert "without adapter_model.safetensors in it" in refused(capsys, "inspect", tmp_path / "folder")
    assert "No such file or directory" in refused(capsys, "inspect", tmp_path / "none.safetensors")
    assert "cannot be read" in refused(capsys, "inspect", "a\0b")


def test_a_name_out_of_a_file_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = raw(tmp_path / "evil.safetensors", {"\x1b[2J\nlora-forge: all is well": entry(0, 400)})
    error = refused(capsys, "inspect", path)
    assert "\x1b" not in error
    assert error.count("\n") == 1


def test_what_a_header_says_is_read_as_it_stands(tmp_path: Path) -> None:
    tensors = small_sdxl()
    header = read_header(saved(tmp_path / "whole.safetensors", tensors, {"ss_v2": "False"}))
    assert {name: stored.shape for name, stored in header.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    assert header.metadata == {"ss_v2": "False"}
    assert header.size == (tmp_path / "whole.safetensors").stat().st_size


@pytest.mark.parametrize("family", COMPONENTS)
def test_every_layer_name_of_published_files_is_understood(family: str) -> None:
    names = (DATA / f"real_{family}_layer_names.txt").read_text().split()
    assert len(names) > 300
    for name in names:
        read = read_name(f"{name}.lora_down.weight")
        assert read is not None
        assert read.component in COMPONENTS[family]
        assert read.layer
        assert universal_name(layout_of(family), read.component, read.layer) == name


def test_every_key_of_published_files_is_understood() -> None:
    keys = (DATA / "real_lora_keys.txt").read_text().split()
    parts = set()
    for key in keys:
        read = read_name(key)
        assert read is not None
        assert key == f"{read.name}.{read.part}" or key.startswith(f"{read.name}.lora_{read.part}")
        assert (read.component, read.layer) != (None, None)
        parts.add(read.part)
    assert parts >= {"up", "down", "alpha", "hada_w1_a", "hada_w2_b", "lokr_w1", "lokr_w2", "oft_diag"}


BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"


@pytest.mark.parametrize(
    ("key", "format", "component", "layer"),
    [
        (f"unet.{BLOCK}.to_q.lora_A.weight", "diffusers", "unet", f"{BLOCK}.to_q"),
        (f"unet.{BLOCK}.processor.to_out_lora.up.weight", "diffusers-old", "unet", f"{BLOCK}.to_out.0"),
        (f"{BLOCK}.to_v.lora.down.weight", "diffusers-old", "unet", f"{BLOCK}.to_v"),
        (
            "text_encoder.text_model.encoder.layers.3.self_attn.q_proj.lora_linear_layer.up.weight",
            "diffusers-old",
            "text_encoder",
            "text_model.encoder.layers.3.self_attn.q_proj",
        ),
        (
            "text_encoder_2.encoder.layers.3.mlp.fc1.lora_B.weight",  # of a transformers without `text_model`
            "diffusers",
            "text_encoder_2",
            "text_model.encoder.layers.3.mlp.fc1",
        ),
        (f"base_model.model.unet.{BLOCK}.to_k.lora_A.default.weight", "peft", "unet", f"{BLOCK}.to_k"),
        (
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0.alpha",
            "kohya",
            "unet",
            f"{BLOCK}.to_out.0",
        ),
        ("lora_unet_middle_block_2_out_layers_3.lora_mid.weight", "kohya", "unet", "mid_block.resnets.1.conv2"),
        ("lora_unet_time_embed_0.diff", "lycoris", "unet", "time_embedding.linear_1"),
        (f"lora_unet_input_blocks_{'9' * 5000}_1_x.alpha", "kohya", "unet", f"input_blocks.{'9' * 5000}.1.x"),
        ("transformer.single_blocks.0.attn.to_k.lora_A.weight", "diffusers", None, None),
    ],
)
def test_each_spelling_leads_to_the_same_canonical_name(
    key: str, format: str, component: str | None, layer: str | None
) -> None:
    read = read_name(key)
    assert read is not None
    assert (read.format, read.component, read.layer) == (format, component, layer)


@pytest.mark.parametrize("key", ["<s1>", "emb_params", "model.diffusion_model.out.2.weight", "", ".", "unet", "alpha"])
def test_a_key_that_is_no_loras_is_not_understood(tmp_path: Path, key: str) -> None:
    assert read_name(key) is None
    lora = open_lora(raw(tmp_path / "a.safetensors", {key: entry(0, 4)}, bytes(4)))
    assert (lora.format, lora.unknown, lora.layers) == ("none", (key,), ())
