"""A base model on the Hub: checked without downloading its weights, and downloaded when they are needed."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
from single_file_checkpoint import FIRST

import lora_forge
from lora_forge.clip_unet.family import Family
from lora_forge.config.run import read_run_config
from lora_forge.errors import ModelError
from lora_forge.plan import Plan, make_plan
from lora_forge.plugins import discover
from lora_forge.recognition import recognized_backend
from lora_forge.session import Session


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, model_folder: Path) -> list[str]:
    """A Hub that has the tiny model as `someone/tiny`, and notes what is downloaded."""
    seen: list[str] = []

    def download(repository: str, name: str) -> str:
        if not (model_folder / name).is_file():
            raise huggingface_hub.errors.EntryNotFoundError(name)
        seen.append(name)
        return str(model_folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "file_exists", lambda repository, name: (model_folder / name).is_file())
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, name: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return seen


def plan(model: str) -> Plan:
    settings = {"prompt": "an owl", "model": model, "base_model": "someone/tiny"}
    return make_plan(read_run_config([settings]), discover())


def test_a_check_downloads_no_weights(model: str, downloads: list[str]) -> None:
    Session(discover(), {}).check_plan(plan(model))
    assert "unet/config.json" in downloads
    assert [name for name in downloads if name.endswith(".safetensors")] == []


def test_a_hub_id_is_recognized_without_its_weights(family: Family, downloads: list[str]) -> None:
    assert recognized_backend("someone/tiny", discover()) == family.name
    assert [name for name in downloads if not name.endswith("config.json")] == []


def test_a_run_downloads_the_weights_it_reaches_and_equals_the_run_from_a_folder(
    model: str, family: Family, downloads: list[str]
) -> None:
    result = lora_forge.run("an owl", model, base_model="someone/tiny", iterations=2)
    weights = {name for name in downloads if name.endswith(".safetensors")}
    assert weights == {f"{encoder}/model.safetensors" for encoder in family.encoders}
    assert result.steps == lora_forge.run("an owl", model, iterations=2).steps


def test_a_lora_given_as_base_model_is_told_from_a_checkpoint(model: str, family: Family, tmp_path: Path) -> None:
    key = FIRST[family.name]
    lora_forge.run("an owl", model, iterations=0, output=tmp_path / "owl.safetensors")
    with pytest.raises(ModelError) as caught:
        lora_forge.run("an owl", model, base_model=str(tmp_path / "owl.safetensors"))
    assert f"owl.safetensors' is no {family.title}: it has no '{key}text_model." in str(caught.value)
