"""Mutated LoRA files given to `lora-forge convert`: each is converted, or refused in one line with nothing written."""

from __future__ import annotations

import gc
import random
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch
from layer_files import Layer, Layers, named, save_diffusers, save_peft, save_universal
from tiny_models import layout_of

from lora_forge.cli.main import main
from lora_forge.files.formats import FORMATS

WORDS = [
    *(b"null", b"-1", b"0", b"1e999", b"9" * 30, b"[]", b"{}", b'""', b"[" * 3000, b"NaN", b"true", b"4"),
    *(b"F32", b"F16", b"BF16", b"F64", b"I8", b"BOOL", b"F8_E4M3", b"[2,3]", b"[0,8]", b"[24,24]", b"\xff", b"\0"),
    *(b"lora_unet", b"lora_te_", b"unet.", b"down_blocks", b"input_blocks", b".alpha", b".lora_up.weight", b"\\u0000"),
    *(b".dora_scale", b"hada_w1_a", b"diff", b"lora_mid", b"..", b"/", b"diffusers", b"peft", b"safetensors", b"rank"),
]


def _seeds(folder: Path) -> list[Path]:
    """One small file of each format, one of them a conversion with a record, one with all that is unlike."""
    layers: Layers = {
        ("unet", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"): Layer(
            torch.ones(2, 3), torch.ones(4, 2), 2.0
        ),
        ("unet", "conv_in"): Layer(torch.ones(2, 1, 3, 3), torch.ones(4, 2, 1, 1), 2.0),
        ("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj"): Layer(
            torch.ones(2, 3), torch.ones(3, 2), 2.0
        ),
    }
    unlike = {
        key: Layer(one.down.half(), one.up.half(), float(number + 1))
        for number, (key, one) in enumerate(layers.items())
    }
    metadata = layout_of("sd15").metadata
    folder.mkdir()
    files = [
        save_universal(folder / "kohya", "sd15", unlike, metadata),
        save_diffusers(folder / "diffusers", layers, {**metadata, "lora_adapter_metadata": '{"unet.lora_alpha": 3}'}),
        save_peft(folder / "peft", layers, {"lora_alpha": 3, "alpha_pattern": {"conv_in": 1}, "r": 2}, metadata),
    ]
    recorded = folder / "recorded.safetensors"
    assert main(["convert", str(files[2]), str(recorded), "--to", "diffusers"]) == 0
    return [*files, recorded]


def _mutated(content: bytes, dice: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        place = dice.randrange(len(data) + 1)
        kind = dice.randrange(6)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << dice.randrange(8)
        elif kind == 1:
            data[place:place] = dice.choice(WORDS)
        elif kind == 2:
            data[place : place + dice.randrange(1, 20)] = dice.choice(WORDS)
        elif kind == 3:
            del data[place : place + dice.randrange(1, 200)]
        elif kind == 4:
            other = dice.randrange(len(data) + 1)
            data[place:place] = data[other : other + dice.randrange(1, 100)]
        else:
            del data[place:]
    if dice.random() < 0.8 and len(data) > 8:  # a header whose length is right gets further
        old = int.from_bytes(content[:8], "little")
        data[:8] = max(0, min(old + len(data) - len(content), len(data) - 8)).to_bytes(8, "little")
    return bytes(data)


def _fuzz(folder: Path, count: int, seed: int, capsys: pytest.CaptureFixture[str]) -> dict[int, int]:
    """How often convert ended with which exit code."""
    dice = random.Random(seed)
    seeds = _seeds(folder / "seeds")
    outcomes: dict[int, int] = {}
    here, output = folder / "in", folder / "out"
    capsys.readouterr()
    slowest = 0.0
    for number in range(count):
        source = dice.choice(seeds)
        if source.is_dir():
            shutil.copytree(source, here, copy_function=shutil.copyfile)
            changed = dice.choice([one for one in sorted(here.rglob("*")) if one.is_file()])
        else:
            changed = Path(shutil.copyfile(source, here))
        changed.write_bytes(_mutated(changed.read_bytes(), dice))
        options = ["--drop-unknown"] if dice.random() < 0.5 else []
        started = time.process_time()
        format = dice.choice(FORMATS)
        code = main(["convert", str(here), str(output), "--to", format, *options])
        slowest = max(slowest, time.process_time() - started)
        printed = capsys.readouterr()
        assert code in (0, 2), (number, printed.err)
        assert "Traceback" not in printed.err
        if code:
            assert printed.err.startswith("lora-forge: error: "), number
            assert printed.err.count("\n") == 1, (number, printed.err)
            assert sorted(one.name for one in folder.iterdir()) == ["in", "seeds"], number
        for path in (here, named(output, format)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        outcomes[code] = outcomes.get(code, 0) + 1
    assert slowest < 30  # a hang
    return outcomes


def test_a_few_hundred_mutated_files_are_converted_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = _fuzz(tmp_path, 400, 1, capsys)
    assert outcomes.keys() == {0, 2}
    assert min(outcomes.values()) > 20


@pytest.mark.exhaustive
def test_twenty_thousand_mutated_files_are_converted_or_refused_and_memory_does_not_grow(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "first").mkdir()
    _fuzz(tmp_path / "first", 1000, 2, capsys)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (tmp_path / "second").mkdir()
    outcomes = _fuzz(tmp_path / "second", 20_000, 3, capsys)
    assert sum(outcomes.values()) == 20_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024  # KiB
