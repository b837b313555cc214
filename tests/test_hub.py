"""A base model on the Hub: checked without downloading its weights, and downloaded when they are needed."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest

import lora_forge
from lora_forge.config.run import read_run_config
from lora_forge.errors import ModelError
from lora_forge.plan import Plan, make_plan
from lora_forge.plugins import discover
from lora_forge.session import Session


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> list[str]:
    """A Hub that has tiny_sdxl as `someone/tiny`, and notes what is downloaded."""
    seen: list[str] = []

    def download(repository: str, name: str) -> str:
        if not (tiny_folder / name).is_file():
            raise huggingface_hub.errors.EntryNotFoundError(name)
        seen.append(name)
        return str(tiny_folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "file_exists", lambda repository, name: (tiny_folder / name).is_file())
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, name: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return seen


def plan() -> Plan:
    settings = {"prompt": "an owl", "model": "tiny_sdxl", "base_model": "someone/tiny"}
    return make_plan(read_run_config([settings]), discover())


def test_a_check_downloads_no_weights(downloads: list[str]) -> None:
    Session(discover(), {}).check_plan(plan())
    assert "unet/config.json" in downloads
    assert [name for name in downloads if name.endswith(".safetensors")] == []


def test_a_run_downloads_the_weights_it_reaches_and_equals_the_run_from_a_folder(downloads: list[str]) -> None:
    settings = {"base_model": "someone/tiny", "iterations": 2}
    result = lora_forge.run("an owl", "tiny_sdxl", **settings)
    weights = {name for name in downloads if name.endswith(".safetensors")}
    assert weights == {"text_encoder/model.safetensors", "text_encoder_2/model.safetensors"}
    assert result.steps == lora_forge.run("an owl", "tiny_sdxl", iterations=2).steps


def test_a_lora_given_as_base_model_is_told_from_a_checkpoint(tmp_path: Path) -> None:
    lora_forge.run("an owl", "tiny_sdxl", iterations=0, output=tmp_path / "owl.safetensors")
    with pytest.raises(ModelError, match=r"owl\.safetensors' is no SDXL: it has no 'conditioner\.embedders"):
        lora_forge.run("an owl", "tiny_sdxl", base_model=str(tmp_path / "owl.safetensors"))
