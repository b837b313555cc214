"""tiny_sdxl and tiny_sd15: complete models which the package makes itself, the same everywhere, without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_forge
from lora_forge.cli.main import main
from lora_forge.clip_unet import tiny
from lora_forge.clip_unet.family import Family
from lora_forge.clip_unet.tiny import cache_folder
from lora_forge.errors import ModelError

MAKE = """
from lora_forge.builtin.sdxl.family import SDXL
from lora_forge.clip_unet.tiny import tiny_folder
print(tiny_folder(SDXL))
"""
CLASSES = {
    "tokenizer": "CLIPTokenizer",
    "text_encoder": "CLIPTextModel",
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
}
OF_ITS_OWN = {
    "sdxl": {
        "tokenizer_2": "CLIPTokenizer",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "scheduler": "EulerDiscreteScheduler",
    },
    "sd15": {"scheduler": "PNDMScheduler"},
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def pipe(family: Family, model_folder: Path) -> Any:
    import diffusers

    pipe = getattr(diffusers, family.pipeline).from_pretrained(model_folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    made = pipe("an owl", num_inference_steps=1, height=64, width=64, generator=generator, output_type="pt")
    images: torch.Tensor = made.images
    return images


def test_it_is_a_complete_model_of_its_family_that_makes_an_image(pipe: Any, family: Family) -> None:
    components = CLASSES | OF_ITS_OWN[family.name]
    assert {name: type(getattr(pipe, name)).__name__ for name in components} == components
    assert {name for name, part in pipe.components.items() if part is not None} == set(components)
    image = picture(pipe)
    assert image.shape == (1, 3, 64, 64)
    assert bool(image.isfinite().all())
    assert float(image.std()) > 0.01


def test_a_lora_of_a_run_changes_its_image(pipe: Any, model: str, tmp_path: Path) -> None:
    before = picture(pipe)
    output = tmp_path / "owl.safetensors"
    lora_forge.run("an owl", model, iterations=5, strength=200, output=output)
    pipe.load_lora_weights(str(output))
    after = picture(pipe)
    pipe.unload_lora_weights()
    assert float((after - before).abs().max()) > 1e-4
    torch.testing.assert_close(picture(pipe), before, rtol=0, atol=1e-5)  # weights that lie elsewhere round otherwise


def test_it_has_every_file_of_the_real_one(family: Family, model_folder: Path) -> None:
    real = {str(path.relative_to(family.configs)) for path in family.configs.rglob("*") if path.is_file()}
    weights = {f"{encoder}/model.safetensors" for encoder in family.encoders}
    weights |= {f"{component}/diffusion_pytorch_model.safetensors" for component in ("unet", "vae")}
    assert real | weights == set(contents(model_folder))


def test_it_is_the_same_to_the_byte_wherever_it_is_made(
    family: Family, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = contents(model_folder)
    for name in ("one", "other"):
        monkeypatch.setenv("LORA_FORGE_CACHE", str(tmp_path / name))
        made = tiny.tiny_folder(family)
        assert made.parent == tmp_path / name
        assert contents(made) == expected
        assert [path.name for path in made.parent.iterdir()] == [made.name]


def test_it_is_made_once(family: Family, model_folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in model_folder.rglob("*")}
    assert tiny.tiny_folder(family) == model_folder
    assert {path: path.stat().st_mtime_ns for path in model_folder.rglob("*")} == before


def test_processes_that_make_it_at_once_all_get_the_whole_of_it(tiny_folder: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "LORA_FORGE_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", MAKE]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {process.communicate(timeout=200)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert folders == {str(tmp_path / tiny_folder.name)}
    assert contents(tmp_path / tiny_folder.name) == contents(tiny_folder)
    assert [path.name for path in tmp_path.iterdir()] == [tiny_folder.name]


def test_a_second_maker_that_comes_late_takes_what_is_there(
    family: Family, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moment between making and renaming, replayed: another process renames first."""
    import shutil

    def build(family: Any, folder: Path) -> None:
        shutil.copytree(model_folder, folder)
        shutil.copytree(model_folder, tmp_path / model_folder.name)

    monkeypatch.setenv("LORA_FORGE_CACHE", str(tmp_path))
    monkeypatch.setattr(tiny, "_build", build)
    assert tiny.tiny_folder(family) == tmp_path / model_folder.name
    assert [path.name for path in tmp_path.iterdir()] == [model_folder.name]


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_FORGE_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("LORA_FORGE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "lora-forge"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "lora-forge"


def test_a_cache_that_cannot_be_written_is_one_line_and_exit_2(
    model: str, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("not a folder")
    monkeypatch.setenv("LORA_FORGE_CACHE", str(occupied / "cache"))
    with pytest.raises(ModelError, match=f"{model} cannot be made"):
        tiny.tiny_folder(family)
    output = tmp_path / "owl.safetensors"
    assert main(["run", "--prompt", "an owl", "--model", model, "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert str(occupied / "cache") in error
    assert error.count("\n") == 1
    assert not output.exists()
