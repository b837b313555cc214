"""Bad input: a clear error on stderr, exit code 2, no traceback, nothing written, and no weights read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_forge.cli.main import main
from lora_forge.clip_unet.backend import ClipUnetBackend
from lora_forge.clip_unet.family import Family
from lora_forge.config.model import shipped_folder

Refused = Callable[..., str]
PROMPT = ("run", "--prompt", "an owl")
TINY = (*PROMPT, "--model", "tiny_sdxl")


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path under a folder, with its size and time of change."""
    return {str(p): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.rglob("*")}


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command line that must be refused, with no weights read and nothing written; its error on stderr."""

    def no_weights(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(ClipUnetBackend, "load", no_weights)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path, lines: int = 1) -> str:
        before = listing(tmp_path)
        code = main([*map(str, arguments)])
        printed = capsys.readouterr()
        assert code == 2, printed.err
        assert printed.out == ""
        assert printed.err.startswith("lora-forge: error: ")
        assert "Traceback" not in printed.err
        assert len(printed.err.splitlines()) == lines, printed.err
        assert listing(tmp_path) == before
        return printed.err.removeprefix("lora-forge: error: ").rstrip("\n")

    return run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", ""], "prompt: is missing or empty; give one with --prompt"),
        (["--prompt", " \t\n"], "prompt: is blank"),
        (["--prompt", "\u3000"], "prompt: is blank"),
        (["--prompt", "bad \udcff byte"], "prompt: is not valid Unicode"),
        (["--model", "tiny_sdxll"], "unknown model 'tiny_sdxll'; did you mean 'tiny_sdxl'?"),
        (["--model", "flux"], "unknown model 'flux'; known: sd15, sdxl_base, tiny_sd15, tiny_sdxl"),
        (["--model", "missing.json"], "model config 'missing.json' does not exist"),
        (["--model", "x" * 300], "unknown model"),
        (["--loss", "embeding_magnitude"], "unknown loss 'embeding_magnitude'; did you mean 'embedding_magnitude'?"),
        (["--loss", "embed_write + embed_preserve"], "is a sum, as `compare` takes them; here each term is given"),
        (["--measure", "zzz"], "measure: unknown loss 'zzz'"),
        (["--loss", "zzz"], "unknown loss 'zzz'; known: conditioning_magnitude, embed_direction, "),
        (["--loss", "embedding_magnitude:"], "loss 'embedding_magnitude': '' is neither a weight nor a name"),
        (["--loss", ":0.5"], "loss"),
        (["--loss", ""], "loss"),
        (["--loss", "embedding_magnitude:inf"], "loss.weight: expected a finite number"),
        (["--loss", "nobody:embedding_magnitude"], "unknown loss 'nobody:embedding_magnitude'"),
        (["--optimizer", "adamx"], "unknown optimizer 'adamx'; did you mean 'adamw'?"),
        (["--initializer", "gausian"], "unknown initializer 'gausian'; did you mean 'gaussian'?"),
        (["--saver", "safetensor"], "unknown saver 'safetensor'; did you mean 'safetensors'?"),
        (["--loss-opt", "size=1"], "embedding_magnitude.size: unknown option; known: layer, tokens"),
        (["--loss-opt", "size"], "--loss-opt takes KEY=VALUE, got 'size'"),
        (["--optimizer-opt", "lrr=1"], "lrr: unknown option; did you mean 'lr'?"),
        (["--optimizer-opt", "lr=fast"], "lr: expected a number, got 'fast'"),
        (["--optimizer-opt", "lr=0"], "lr: must be > 0"),
        (["--optimizer-opt", "betas=0.9"], "betas: expected 2 values, got 1"),
        (["--backend-opt", "confg=x"], "confg: unknown option; did you mean 'config'?"),
        (["--dtype", "flot32"], "dtype: 'flot32' is not a choice; did you mean 'float32'?"),
        (["--device", "cudaa"], "device: unknown device 'cudaa'; did you mean 'cuda'?"),
        (["--device", "tpu"], "device: unknown device 'tpu'"),
        (["--inert", "kep"], "inert: 'kep' is not a choice; did you mean 'keep'?"),
        (["--iterations", "-1"], "iterations: must be ≥ 0, got -1"),
        (["--iterations", "2.5"], "iterations: expected an integer, got '2.5'"),
        (["--iterations", "many"], "iterations: expected an integer"),
        (["--rank", "0"], "rank: must be ≥ 1, got 0"),
        (["--rank", "-4"], "rank: must be ≥ 1, got -4"),
        (["--rank", "33"], "33 is larger than text_encoder.text_model.encoder.layers.0.self_attn.k_proj, [32, 32]"),
        (["--alpha", "0"], "alpha: must be > 0"),
        (["--alpha", "nan"], "alpha: expected a finite number"),
        (["--l2", "-1"], "l2: must be ≥ 0"),
        (["--seed", "-1"], "seed: must be ≥ 0"),
        (["--seed", "x"], "seed: expected an integer"),
        (["--date", "soon"], "date: expected a date"),
        (["--strength", "1", "--target-shift", "0.1"], "give strength or target_shift, not both"),
        (["--target-shift", "0"], "target_shift: must be > 0"),
        (["--init-from", "missing.safetensors"], "init_from: 'missing.safetensors' does not exist"),
        (["--plugin", "missing.py"], "plugin file 'missing.py' does not exist"),
        (["--config", "missing.toml"], "run config cannot be read"),
        (["--iteratons", "5"], "--iterations"),
        (["--iterations"], "requires an argument"),
        (["surplus"], "unexpected extra argument"),
        (["--base-model", "missing"], "base model 'missing' does not exist"),
        (["--base-model", "/missing/folder"], "base model '/missing/folder' does not exist"),
        (["--base-model", "x" * 300], "does not exist"),
        (["--base-model", "some/repository"], "the Hub"),
    ],
)
def test_what_cannot_be_done_as_asked_is_one_line_that_says_why(
    refused: Refused, arguments: list[str], words: str
) -> None:
    assert words in refused(*TINY, *arguments)


def test_a_run_without_a_prompt_says_that_it_is_missing_and_how_to_give_it(refused: Refused) -> None:
    assert 'prompt: is missing or empty; give one with --prompt "a steampunk owl"' in refused("run")


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "URL"),
        ("convert", "URL", "owl.safetensors", "--to", "safetensors"),
        ("convert", "URL", "owl", "--to", "peft"),
        ("merge", "URL", "-o", "owl.safetensors"),
        ("merge", "URL:0.5", "-o", "owl.safetensors"),
        ("effect", "URL", "--prompt", "an owl"),
        ("run", "--like", "URL"),
        ("run", "--prompt", "an owl", "--model", "tiny_sdxl", "--init-from", "URL"),
    ],
    ids=" ".join,
)
def test_a_url_in_place_of_a_file_is_told_as_it_was_given_and_to_be_downloaded_first(
    arguments: tuple[str, ...], refused: Refused
) -> None:
    url = "https://example.org/loras/owl.safetensors?download=true"
    error = refused(*(word.replace("URL", url) for word in arguments))
    assert f"{url!r} is a URL, which cannot be read; download it first, and give the file" in error


def test_an_unknown_command_is_named_with_the_nearest_known_one(refused: Refused) -> None:
    assert refused("rnu") == "unknown command 'rnu'; did you mean 'run'?"
    assert "unknown model 'tiny'; did you mean 'tiny_sdxl'?" in refused("models", "show", "tiny")


def test_several_mistakes_are_listed_together(refused: Refused) -> None:
    first, *rest = refused(*TINY, "--rank", "0", "--iterations", "-1", "--loss", "zzz", lines=4).splitlines()
    assert first == "3 mistakes"
    assert [line.strip().split(":")[0] for line in rest] == ["rank", "iterations", "loss"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_device_that_is_absent_is_refused(refused: Refused, device: str) -> None:
    assert f"device: {device!r} was asked for" in refused(*TINY, "--device", device)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (None, "not valid JSON"),
        ({"lora_alpha": None}, "lora_alpha: is missing"),
        ({"lora_rank": 0}, "lora_rank: expected an integer ≥ 1, got 0"),
        ({"lora_rank": 1.5}, "lora_rank: expected an integer ≥ 1, got 1.5"),
        ({"lora_rank": 64}, "lora_rank: 64 is larger than text_encoder."),
        ({"layer_dimensions_unet": None}, "layer_dimensions_unet: is missing"),
        ({"target_layers_unet": ["to_kk"], "layer_dimensions_unet": {}}, "target_layers_unet.to_kk: no such layer"),
        ({"backend": "sdxll"}, "unknown backend 'sdxll'; did you mean 'sdxl'?"),
        ({"base_model": None}, "base_model: model config 'mine' names none; give one"),
        ({"base_model": None, "backend": None}, "base_model: model config 'mine' names none; give one"),
    ],
)
def test_a_model_config_with_a_mistake_is_refused(
    refused: Refused, tmp_path: Path, change: dict[str, Any] | None, words: str
) -> None:
    data = json.loads((shipped_folder() / "tiny_sdxl_config.json").read_text(encoding="utf-8")) | (change or {})
    text = json.dumps({key: value for key, value in data.items() if value is not None})
    (tmp_path / "mine.json").write_text(text if change else text[:-1], encoding="utf-8")
    assert words in refused(*PROMPT, "--model", "mine.json")


def test_an_objective_that_reaches_nothing_trainable_is_refused(refused: Refused, tmp_path: Path) -> None:
    data = json.loads((shipped_folder() / "tiny_sdxl_config.json").read_text(encoding="utf-8"))
    (tmp_path / "mine.json").write_text(json.dumps({k: v for k, v in data.items() if "text" not in k}), "utf-8")
    error = refused(*PROMPT, "--model", "mine.json")
    assert "embedding_magnitude" in error
    assert "unet" in error
    assert "nothing would be trained" in error


def linked_copy(source: Path, folder: Path) -> Path:
    """A folder of links to another's files, so that single ones can be replaced."""
    shutil.copytree(source, folder, copy_function=os.symlink)
    return folder


def replace(path: Path, content: bytes | None) -> None:
    path.unlink()
    if content is not None:
        path.write_bytes(content)


def cut(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: len(content) * 3 // 4]


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("text_encoder/model.safetensors", "missing", "has no {file}"),
        ("{encoder}/model.safetensors", "missing", "has no {file}"),
        ("text_encoder/model.safetensors", "cut", "{file} is broken or truncated"),
        ("{encoder}/model.safetensors", "empty", "{file} is broken or truncated"),
        ("text_encoder/config.json", "missing", "has no {file}"),
        ("text_encoder/config.json", "cut", "{file} is not valid JSON"),
        ("unet/config.json", "missing", "has no {file}"),
        ("unet/config.json", "empty", "{file} is not valid JSON"),
        ("tokenizer/vocab.json", "missing", "has no {file}"),
        ("tokenizer/vocab.json", "cut", "tokenizer is broken or truncated"),
        ("{tokenizer}/merges.txt", "missing", "{file}"),
        ("{tokenizer}/merges.txt", "lines cut", "{tokenizer} is truncated"),
        ("{tokenizer}/merges.txt", "empty", "{tokenizer} is truncated"),
    ],
)
def test_a_base_model_with_a_missing_or_truncated_file_is_refused(
    refused: Refused, model: str, family: Family, model_folder: Path, tmp_path: Path, file: str, damage: str, words: str
) -> None:
    encoder, kind = list(family.encoders.items())[-1]
    names = {"encoder": encoder, "tokenizer": kind.tokenizer}
    names["file"] = file.format(**names)
    path = linked_copy(model_folder, tmp_path / "base") / names["file"]
    content = {"missing": None, "empty": b"", "cut": cut(path), "lines cut": cut(path).rpartition(b"\n")[0]}[damage]
    replace(path, content)
    error = refused(*PROMPT, "--model", model, "--base-model", "base")
    assert error.startswith(("base model 'base'", "base model 'base':"))
    assert words.format(**names) in error


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ('{"hidden_size": "wide"}', "text_encoder: its config.json makes no model"),
        ('{"hidden_size": 33, "num_attention_heads": 2}', "text_encoder: its config.json makes no model"),
        ("[]", "text_encoder/config.json is not an object"),
    ],
)
def test_a_config_that_makes_no_model_is_one_line(
    refused: Refused, tiny_folder: Path, tmp_path: Path, config: str, words: str
) -> None:
    replace(linked_copy(tiny_folder, tmp_path / "base") / "text_encoder/config.json", config.encode())
    assert words in refused(*TINY, "--base-model", "base")


@pytest.mark.parametrize("content", [b"{", b"{}", b"[]", b'{"weight_map": 3}', b'{"weight_map": {"a": "gone"}}'])
def test_an_index_of_weights_that_is_none_is_refused(
    refused: Refused, tiny_folder: Path, tmp_path: Path, content: bytes
) -> None:
    encoder = linked_copy(tiny_folder, tmp_path / "base") / "text_encoder"
    replace(encoder / "model.safetensors", None)
    (encoder / "model.safetensors.index.json").write_bytes(content)
    assert "base model 'base'" in refused(*TINY, "--base-model", "base")


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "notes.txt"])
def test_a_pickle_is_never_read(refused: Refused, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    assert "only .safetensors" in refused(*TINY, "--base-model", name)


def test_files_of_components_out_of_reach_are_not_asked_for(
    model: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = linked_copy(model_folder, tmp_path / "base")
    for folder in ("unet", "vae"):
        replace(base / folder / "diffusion_pytorch_model.safetensors", None)
    monkeypatch.chdir(tmp_path)
    command = [*PROMPT, "--model", model, "--base-model", "base", "--iterations", "1"]
    assert main([*command, "-o", "owl.safetensors", "--json"]) == 0
    assert (tmp_path / "owl.safetensors").is_file()


@pytest.fixture
def bad_outputs(tmp_path: Path) -> dict[str, tuple[str, str]]:
    """Outputs that cannot be written: how each is spelled, and what is said of it."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "there.safetensors").write_bytes(b"dear to someone")
    os.mkfifo(tmp_path / "pipe.safetensors")
    return {
        "directory": ("folder", "output 'folder' is a directory"),
        "exists": ("there.safetensors", "exists; --overwrite replaces it"),
        "exists, suffix left out": ("there", "exists; --overwrite replaces it"),
        "parent is a file": ("there.safetensors/owl.safetensors", "is not a directory"),
        "no such file system": ("/proc/owl.safetensors", "cannot be written"),
        "name too long": ("x" * 300, "cannot be written"),
        "folder too long": ("x" * 300 + "/owl.safetensors", "cannot be written"),
        "no regular file": ("pipe.safetensors", "exists"),
    }


OUTPUTS = ["directory", "exists", "exists, suffix left out", "parent is a file", "no such file system"]
OUTPUTS += ["name too long", "folder too long", "no regular file"]


@pytest.mark.parametrize("case", OUTPUTS)
def test_an_output_that_cannot_be_written_is_found_before_any_weight_is_read(
    refused: Refused, bad_outputs: dict[str, tuple[str, str]], tiny_folder: Path, tmp_path: Path, case: str
) -> None:
    weights = linked_copy(tiny_folder, tmp_path / "base") / "text_encoder" / "model.safetensors"
    replace(weights, cut(weights))  # were the weights looked at first, the error would be theirs
    output, words = bad_outputs[case]
    assert words in refused(*TINY, "--base-model", "base", "-o", output)
    assert words in refused(*TINY, "--base-model", "base", "-o", output, "--dry-run")
    if "exists" not in words:
        assert words in refused(*TINY, "--base-model", "base", "-o", output, "--overwrite")


def test_overwrite_replaces_no_more_than_regular_files(refused: Refused, bad_outputs: object) -> None:
    assert "is not a regular file" in refused(*TINY, "-o", "pipe.safetensors", "--overwrite")


def test_an_init_from_that_is_no_lora_of_this_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(b"not one")
    assert main([*TINY, "--init-from", "broken.safetensors", "-o", "owl.safetensors"]) == 2
    error = capsys.readouterr().err
    assert "broken.safetensors is not a readable safetensors file" in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["broken.safetensors"]


def test_a_process_of_its_own_says_it_the_same_way(
    cli: Callable[..., subprocess.CompletedProcess[str]], tiny_folder: Path, tmp_path: Path
) -> None:
    replace(linked_copy(tiny_folder, tmp_path / "base") / "text_encoder" / "model.safetensors", b"")
    for arguments, words in [
        (["--prompt", " "], "prompt: is blank"),
        (["--base-model", "base"], "text_encoder/model.safetensors is broken or truncated"),
    ]:
        before = listing(tmp_path)
        done = cli(*TINY, *arguments, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
        assert listing(tmp_path) == before
