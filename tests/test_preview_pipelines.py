"""`Backend.pipeline`: of every kind of base model the same pictures as diffusers makes from the folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from diffusers_reader import open_pipeline
from preview_by_hand import picture, same, write_checkpoint
from single_file_checkpoint import write_single_file

from lora_forge.bank import BankSlot
from lora_forge.choices import Chosen
from lora_forge.clip_unet.backend import ClipUnetBackend
from lora_forge.clip_unet.family import Family
from lora_forge.contracts import Backend, BackendRequest, TargetLayer
from lora_forge.errors import ModelError
from lora_forge.plugins import discover

PROMPT = "a steampunk owl"


@pytest.fixture(scope="module")
def expected(family: Family, model_folder: Path) -> np.ndarray[Any, Any]:
    return picture(open_pipeline(family.name, model_folder), PROMPT, 0)


def opened(family: Family, source: str | Path, *, configs: Path | None = None, **request: Any) -> Backend:
    supplied = discover().resolve("backend", family.name)
    options = supplied.spec.options(**({"config": configs} if configs else {}))
    settings = {"device": "cpu", "dtype": "float32", **request}
    backend: Backend = Chosen(supplied, options).build()(BackendRequest(str(source), **settings))
    return backend


def test_the_tiny_model_and_its_folder_make_diffusers_pictures(
    model: str, family: Family, model_folder: Path, expected: np.ndarray[Any, Any]
) -> None:
    for source in (model, model_folder):
        pipe = opened(family, source).pipeline()
        assert type(pipe).__name__ == family.pipeline
        assert same(picture(pipe, PROMPT, 0), expected)
        parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        assert not any(part.training or any(one.requires_grad for one in part.parameters()) for part in parts)
        assert {one.device.type for part in parts for one in part.parameters()} == {"cpu"}


def test_the_dtype_is_the_one_asked_for(model: str, family: Family) -> None:
    pipe = opened(family, model, dtype="bfloat16").pipeline()
    assert {str(part.dtype) for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {"torch.bfloat16"}


def test_a_checkpoint_in_one_file_makes_the_same_with_configs_and_tokenizers_from_elsewhere(
    family: Family, model_folder: Path, expected: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    file = write_checkpoint(family.name, model_folder, tmp_path / "whole.safetensors")
    configs = tmp_path / "configs"
    shutil.copytree(model_folder, configs, ignore=shutil.ignore_patterns("*.safetensors"))
    assert same(picture(opened(family, file, configs=configs).pipeline(), PROMPT, 0), expected)
    (configs / "model_index.json").unlink()  # the scheduler's own config names its class, too
    without = opened(family, file, configs=configs).pipeline()
    assert type(without.scheduler) is type(opened(family, model_folder).pipeline().scheduler)


def test_a_checkpoint_without_a_vae_says_so(family: Family, model_folder: Path, tmp_path: Path) -> None:
    file = write_single_file(family.name, model_folder, tmp_path / "half.safetensors")
    with pytest.raises(ModelError, match=r"half.safetensors': vae: .*missing in the checkpoint"):
        opened(family, file, configs=model_folder).pipeline()


def test_of_the_hub_only_the_pipelines_own_parts_are_downloaded(
    family: Family, model_folder: Path, expected: np.ndarray[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In half precision, and with a safety checker in its index, as published models are."""
    there, cache = tmp_path / "there", tmp_path / "cache"
    shutil.copytree(model_folder, there)
    for file in there.rglob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    index = json.loads((there / "model_index.json").read_text(encoding="utf-8"))
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (there / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    (there / "safety_checker").mkdir()
    (there / "safety_checker" / "model.safetensors").touch()

    def download(repository: str, name: str) -> str:
        if not (there / name).is_file():
            raise huggingface_hub.errors.EntryNotFoundError(name)
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(there / name, cache / name))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "file_exists", lambda repository, name: (there / name).is_file())
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, name: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    pipe = opened(family, "someone/tiny").pipeline()
    assert same(picture(pipe, PROMPT, 0), expected)
    weights = sorted(path.parent.name for path in cache.rglob("*.safetensors"))
    assert weights == sorted([*family.components, "vae"])


def test_a_pipeline_in_memory_is_given_back_itself_but_not_with_a_runs_layers_in_it(
    family: Family, model_folder: Path
) -> None:
    pipe = open_pipeline(family.name, model_folder)
    backend = opened(family, "", pipeline=pipe)
    assert isinstance(backend, ClipUnetBackend)
    assert backend.pipeline() is pipe
    layer, (out, into) = next(iter(backend.architecture()["text_encoder"].items()))
    backend.load(["text_encoder"])
    backend.adapt([TargetLayer("text_encoder", layer, out, into)], 2, 2.0, BankSlot())
    with pytest.raises(ModelError, match=r"release\(\) takes them out"):
        backend.pipeline()
    backend.release()
    assert backend.pipeline() is pipe


def test_what_a_model_lacks_for_pictures_is_told(family: Family, model_folder: Path, tmp_path: Path) -> None:
    for part, words in [
        ("vae/config.json", "has no vae/config.json"),
        ("vae/diffusion_pytorch_model.safetensors", "has no vae/diffusion_pytorch_model.safetensors"),
        ("scheduler/scheduler_config.json", "makes no pictures: it has no scheduler/scheduler_config.json"),
    ]:
        folder = tmp_path / part.replace("/", "_")
        shutil.copytree(model_folder, folder)
        (folder / part).unlink()
        with pytest.raises(ModelError, match=words):
            opened(family, folder).pipeline()
    index = folder / "model_index.json"
    shutil.copytree(model_folder / "scheduler", folder / "scheduler", dirs_exist_ok=True)
    index.write_text(index.read_text(encoding="utf-8").replace("Scheduler", "Nothing"), encoding="utf-8")
    with pytest.raises(ModelError, match="makes no pictures: its scheduler is a"):
        opened(family, folder).pipeline()
    truncated = tmp_path / "truncated"
    shutil.copytree(model_folder, truncated)
    vae = truncated / "vae" / "diffusion_pytorch_model.safetensors"
    vae.write_bytes(vae.read_bytes()[:-100])
    with pytest.raises(ModelError, match="base model 'truncated': vae: "):
        opened(family, truncated).pipeline()
