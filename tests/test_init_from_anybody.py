"""`init_from`: files that others wrote, in every spelling, and PEFT's folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from layer_files import Layers, contents, random_layers, save_diffusers, save_kohya, save_peft, save_universal
from refusals import refused
from tiny_models import layout_of

import lora_forge
from lora_forge.clip_unet.family import Family
from lora_forge.errors import LoraFileError

PREFIXES = {"text_encoder_2": "lora_te2", "unet": "lora_unet"}


def written(path: Path, family: str, layers: Layers, spelling: str) -> Path:
    prefixes = {"text_encoder": "lora_te1" if family == "sdxl" else "lora_te", **PREFIXES}
    if spelling == "kohya with diffusers' blocks":
        return save_kohya(path, layers, lambda component, layer: f"{prefixes[component]}_{layer}".replace(".", "_"))
    if spelling == "no text_model":
        return save_diffusers(path, {(c, layer.removeprefix("text_model.")): one for (c, layer), one in layers.items()})
    if spelling == "a folder of PEFT's":
        return save_peft(path, layers, {"r": 4, "lora_alpha": 8}, {})
    return save_universal(path, family, layers)


@pytest.mark.parametrize("spelling", ["kohya", "kohya with diffusers' blocks", "no text_model", "a folder of PEFT's"])
def test_a_run_starts_from_a_file_of_any_spelling(model: str, family: Family, tmp_path: Path, spelling: str) -> None:
    layers = random_layers(model, alpha=None if spelling == "no text_model" else 8.0)
    file = written(tmp_path / "earlier", family.name, layers, spelling)
    start = lora_forge.run("an owl", model, iterations=0, init_from=file)
    for (component, layer), one in layers.items():
        pair = start.weights[component][layer]
        assert torch.equal(pair["lora_A"], one.down)
        assert torch.equal(pair["lora_B"], one.up * (1 if one.alpha is None else 2))


def test_the_record_of_a_run_names_the_folder_it_started_from_by_what_is_in_it(tmp_path: Path) -> None:
    layers = random_layers("tiny_sd15", alpha=8.0)
    digests = []
    for number, alpha in enumerate((8, 8, 4)):
        folder = save_peft(tmp_path / str(number) / "earlier", layers, {"r": 4, "lora_alpha": alpha}, {})
        output = tmp_path / f"{number}.safetensors"
        lora_forge.run("an owl", "tiny_sd15", iterations=0, init_from=folder, output=output)
        result = lora_forge.run("an owl", "tiny_sd15", iterations=0, init_from=folder)
        digests.append(result.metadata["lora_forge"] if result.metadata else output.read_bytes())
        assert contents(output)
    assert digests[0] == digests[1] != digests[2]


def test_layers_that_are_no_plain_lora_are_refused(model: str, family: Family, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = save_universal(tmp_path / "earlier", family.name, random_layers(model, alpha=4.0))
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith(".lora_up.weight")).removesuffix(".lora_up.weight")
    save_file({**tensors, f"{name}.dora_scale": torch.ones(1)}, file, dict(layout_of(family.name).metadata))
    with pytest.raises(LoraFileError, match=f"{name}' is no plain LoRA layer"):
        lora_forge.run("an owl", model, iterations=0, init_from=file)


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(
        capsys, "run", "--prompt", "an owl", "--model", "tiny_sd15", "--init-from", tmp_path, "-o", tmp_path / "a"
    )
    assert "is a folder without adapter_model.safetensors in it" in error
    assert list(tmp_path.iterdir()) == []
