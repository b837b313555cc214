"""Mutated files: `inspect` tells them or refuses them, and does nothing else: no traceback, no hang, no growth."""

from __future__ import annotations

import contextlib
import io
import json
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import Q_PROJ, TO_K, numbers, pair, saved, small_sdxl

from lora_forge.cli.main import main

WORDS: tuple[Any, ...] = (
    *(0, -1, 1, 3, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, 0.5, True, None, "", "F32", "F16", "BF16", "F4", "F8_E4M3"),
    *([], [0], [1], [2, 3], [0, 0], [2**32, 2**32], [-1, 2], [[1]], ["1"], [1] * 9, {}, {"a": 1}),
)
ENDS = (
    *(".alpha", ".lora_down.weight", ".lora_up.weight", ".lora_mid.weight", ".lora_A.weight", ".lora_B.weight"),
    *(".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".hada_t1", ".lokr_w1", ".lokr_w2", ".lokr_w2_a"),
    *(".lokr_w2_b", ".lokr_t2", ".diff", ".diff_b", ".dora_scale", ".oft_diag", ".scalar", "", "\x1b[31m", "\ud800"),
)
STARTS = (
    "lora_unet_",
    "lora_te1_",
    "lora_te_",
    "unet.",
    "text_encoder_2.",
    "base_model.model.",
    "",
    "unet:1:",
    "\u202e",
)


def originals(folder: Path) -> list[bytes]:
    """Small files of every spelling and kind."""
    hada = {name: numbers(2, 2) for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")}
    lokr = {"lokr_w1": numbers(2, 2), "lokr_w2_a": numbers(3, 2), "lokr_w2_b": numbers(2, 3)}
    record = json.dumps({"run": {"prompt": "an owl", "loss": [{"name": "x", "weight": 1.0}]}, "versions": {"a": "1"}})
    told = json.dumps({"unet.lora_alpha": 4, "unet.alpha_pattern": {"a": 1}})
    files: list[tuple[dict[str, torch.Tensor], dict[str, str]]] = [
        (small_sdxl(), {"lora_forge": record}),
        ({name: tensor.half() for name, tensor in pair(TO_K, 3, 4).items()}, {"ss_network_dim": "2"}),
        ({f"{Q_PROJ}.{name}": tensor for name, tensor in {**hada, "alpha": torch.tensor(2.0)}.items()}, {}),
        ({f"{TO_K}.{name}": tensor.bfloat16() for name, tensor in lokr.items()}, {}),
        ({f"{TO_K}.diff": numbers(3, 2), f"{Q_PROJ}.dora_scale": numbers(2), **pair(Q_PROJ, 2, 2)}, {}),
        ({f"unet.mid_block.a.lora_{part}.weight": numbers(2, 2) for part in "AB"}, {"lora_adapter_metadata": told}),
        ({f"unet:{number}:{part}": numbers(1, 1) for number in range(2) for part in ("up", "down")}, {"unet": "[]"}),
    ]
    return [saved(folder / f"{number}", *file).read_bytes() for number, file in enumerate(files)]


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: Any, tensors: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + tensors


def flip(content: bytes, chance: random.Random) -> bytes:
    """Any bytes, mostly of the header."""
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8))):
        end = len(changed) if chance.random() < 0.3 else min(len(changed), 8 + int.from_bytes(content[:8], "little"))
        changed[chance.randrange(end)] = chance.choice((0, 255, 34, 48, 57, 91, 123, chance.randrange(256)))
    return bytes(changed)


def cut(content: bytes, chance: random.Random) -> bytes:
    """Shorter or longer than it should be."""
    if chance.random() < 0.3:
        return content + chance.randbytes(chance.randrange(1, 9))
    return content[: chance.randrange(len(content))]


def resize(content: bytes, chance: random.Random) -> bytes:
    """Another length of the header."""
    length = int.from_bytes(content[:8], "little")
    other = chance.choice((0, 1, 2, length - 1, length + 1, 2**24, 2**25 + 1, 10**8, 2**63, 2**64 - 1))
    return other.to_bytes(8, "little") + content[8:]


def describe(content: bytes, chance: random.Random) -> bytes:
    """A tensor described otherwise."""
    header, tensors = split(content)
    name = chance.choice([name for name in header if name != "__metadata__"])
    if chance.random() < 0.2:
        header[name] = chance.choice(WORDS)
    else:
        header[name][chance.choice(("dtype", "shape", "data_offsets", "more"))] = chance.choice(WORDS)
    return joined(header, tensors)


def reshape(content: bytes, chance: random.Random) -> bytes:
    """A tensor of another shape or dtype that fits its bytes."""
    header, tensors = split(content)
    tensor = header[chance.choice([name for name in header if name != "__metadata__"])]
    size = tensor["data_offsets"][1] - tensor["data_offsets"][0]
    width, dtype = chance.choice(
        [(4, "F32"), (2, "F16"), (2, "BF16"), (1, "F8_E4M3"), (8, "F64"), (1, "BOOL"), (4, "I32")]
    )
    rows = chance.choice((1, 2, 3, 4, 8))
    shapes = [[size // width], [rows, size // width // rows], [size // width, 1, 1, 1], [1, 1, size // width]]
    tensor |= {"dtype": dtype, "shape": chance.choice(shapes)}
    return joined(header, tensors)


def rename(content: bytes, chance: random.Random) -> bytes:
    """Tensors of other names."""
    header, tensors = split(content)
    names = [name for name in header if name != "__metadata__"]
    for name in chance.sample(names, chance.randrange(1, len(names) + 1)):
        stem = name.partition(".")[0] if chance.random() < 0.5 else chance.choice(STARTS) + name[: chance.randrange(30)]
        header[stem + chance.choice(ENDS)] = header.pop(name)
    return joined(header, tensors)


def annotate(content: bytes, chance: random.Random) -> bytes:
    """Other metadata, legible or not."""
    header, tensors = split(content)
    key = chance.choice(
        ("lora_forge", "lora_adapter_metadata", "ss_base_model_version", "\x1b]0;x\x07", "../..", "[red]")
    )
    value: Any = chance.choice((*WORDS, "[" * 999, '{"run": []}', '{"run": {"loss": {"a": 1}}}', "\ud800", "x" * 9999))
    header["__metadata__"] = {key: value if chance.random() < 0.2 else json.dumps(value)}
    return joined(header, tensors)


def poison(content: bytes, chance: random.Random) -> bytes:
    """Numbers that are none, or are enormous, tiny or zero."""
    header, tensors = split(content)
    changed = bytearray(tensors)
    for _ in range(chance.choice((1, 3, 99))):
        place = chance.randrange(0, max(1, len(changed) - 3))
        word = chance.choice(
            (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff", b"\x00\x00\x00\x00", b"\xff\xff\x7f\x7f", b"\x01\0\0\0")
        )
        changed[place : place + 4] = word
    return joined(header, bytes(changed[: len(tensors)]))


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(flip, cut, resize, describe, reshape, reshape, rename, rename, annotate, poison),
)


def inspect_mutated(folder: Path, count: int, seed: int) -> dict[int, int]:
    """How many of the mutated files had each exit code."""
    chance, codes = random.Random(seed), {0: 0, 2: 0}
    contents, path = originals(folder), folder / "mutated.safetensors"
    for number in range(count):
        content = chance.choice(contents)
        mutation = chance.choice(MUTATIONS)
        content = mutation(content, chance)
        if mutation in (reshape, rename, annotate) and chance.random() < 0.3:
            content = chance.choice((reshape, rename, poison, annotate))(content, chance)
        path.write_bytes(content)
        options = ["--json"] if number % 10 else chance.choice(([], ["--layers"], ["--headers"]))
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(["inspect", str(path), *options])
        codes[code] += 1
        assert err.getvalue().count("\n") == (code == 2), err.getvalue()
        assert "\x1b" not in out.getvalue() + err.getvalue()
        if options == ["--json"] and out.getvalue():
            json.loads(out.getvalue(), parse_constant=pytest.fail)
    return codes


def test_some_hundred_mutated_files_are_told_or_refused(tmp_path: Path) -> None:
    codes = inspect_mutated(tmp_path, 400, seed=1)
    assert min(codes.values()) > 50


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(2, 6))
def test_20_000_mutated_files_are_told_or_refused_without_growth(tmp_path: Path, seed: int) -> None:
    inspect_mutated(tmp_path, 500, seed=seed + 100)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    codes = inspect_mutated(tmp_path, 5000, seed=seed)
    assert min(codes.values()) > 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


@pytest.mark.parametrize("seed", range(4))
def test_a_page_of_a_mutated_file_is_whole(tmp_path: Path, seed: int) -> None:
    chance, path, page = random.Random(seed), tmp_path / "mutated.safetensors", tmp_path / "page.html"
    for content in originals(tmp_path):
        path.write_bytes(chance.choice((rename, reshape, annotate, poison))(content, chance))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            code = main(["inspect", str(path), "--html", str(page), "--overwrite"])
        assert page.exists() == (code == 0)
        if code == 0:
            assert page.read_text(encoding="utf-8").endswith("</html>")
            page.unlink()
