"""What a UNet's config comes to is worked out once and kept: the answer is the same wherever it comes from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_forge.builtin.sd15.backend import Sd15Backend
from lora_forge.builtin.sdxl.backend import SdxlBackend
from lora_forge.clip_unet import architecture
from lora_forge.clip_unet.family import Family
from lora_forge.contracts import BackendRequest
from lora_forge.errors import ModelError

BACKENDS = {"sdxl": SdxlBackend, "sd15": Sd15Backend}
Sizes = dict[str, tuple[int, int]]
Ask = Callable[[], Sizes]
ASK = """
import json, sys
from lora_forge.builtin.sdxl.backend import SdxlBackend
from lora_forge.contracts import BackendRequest
print(json.dumps(SdxlBackend.open(BackendRequest(sys.argv[1], "cpu", "float32")).architecture()["unet"]))
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with nothing in it."""
    monkeypatch.setenv("LORA_FORGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def ask(family: Family, model_folder: Path, cache: Path) -> Ask:
    """The UNet's layers, as a process says that has not been asked before."""

    def asked() -> Sizes:
        architecture.layers_of_config.cache_clear()
        backend = BACKENDS[family.name].open(BackendRequest(str(model_folder), "cpu", "float32"))
        return backend.architecture()["unet"]

    return asked


@pytest.fixture
def without_diffusers(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, importing diffusers fails."""
    return lambda: monkeypatch.setitem(sys.modules, "diffusers", None)


def naive_layers(folder: Path) -> Sizes:
    """The linear layers of the UNet itself."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads((folder / "unet/config.json").read_text(encoding="utf-8")))
    linear = {name: module for name, module in unet.named_modules() if isinstance(module, nn.Linear)}
    return {name: (module.out_features, module.in_features) for name, module in linear.items()}


def kept(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file())


def test_the_first_answer_and_the_kept_one_are_the_models_own_in_its_order(
    ask: Ask, model_folder: Path, without_diffusers: Callable[[], None]
) -> None:
    expected = list(naive_layers(model_folder).items())
    assert list(ask().items()) == expected
    without_diffusers()
    assert list(ask().items()) == expected


def test_one_file_is_kept_for_each_config_and_diffusers(
    ask: Ask, cache: Path, without_diffusers: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask()
    ask()
    assert len(kept(cache)) == 1
    monkeypatch.setattr(architecture, "version", lambda package: f"another {package}")
    ask()
    assert len(kept(cache)) == 2
    monkeypatch.setattr(architecture, "version", lambda package: f"a third {package}")
    without_diffusers()
    with pytest.raises(ModelError, match="makes no model"):
        ask()


@pytest.mark.parametrize(
    "broken",
    [
        lambda whole: b"",
        lambda whole: whole[:-9],
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole.replace(b"[", b"[1", 1),
        lambda whole: whole.partition(b"\n")[2],
        lambda whole: b"\xff\xfe\x00" + whole,
        lambda whole: b"{}",
    ],
    ids=["empty", "cut short", "half", "another number", "no digest", "not text", "an empty object"],
)
def test_a_kept_file_that_is_broken_is_not_believed_and_is_made_anew(
    ask: Ask, cache: Path, broken: Callable[[bytes], bytes]
) -> None:
    expected = ask()
    (file,) = kept(cache)
    whole = file.read_bytes()
    file.write_bytes(broken(whole))
    assert ask() == expected
    assert kept(cache) == [file]
    assert file.read_bytes() == whole


def test_a_folder_where_the_file_belongs_is_left_alone(ask: Ask, cache: Path) -> None:
    expected = ask()
    (file,) = kept(cache)
    file.unlink()
    file.mkdir()
    assert ask() == expected
    assert file.is_dir()
    assert kept(cache) == []


def test_a_cache_that_cannot_be_written_costs_time_alone(
    ask: Ask, cache: Path, model_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cache.write_text("not a folder")
    assert ask() == naive_layers(model_folder)
    assert cache.read_text() == "not a folder"
    assert "cache" not in capfd.readouterr().err


def test_a_user_without_a_home_has_no_cache(ask: Ask, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LORA_FORGE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    assert ask() == naive_layers(model_folder)


@pytest.mark.slow
def test_processes_that_ask_at_once_all_get_the_same_answer(tiny_folder: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "LORA_FORGE_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", ASK, str(tiny_folder)]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [json.loads(process.communicate(timeout=200)[0]) for process in processes]
    expected = {name: list(size) for name, size in naive_layers(tiny_folder).items()}
    assert answers == [expected, expected]
    assert len(kept(tmp_path)) == 1
