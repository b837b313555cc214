"""What `lora-forge convert` writes, read by those who read it: diffusers and PEFT, every key and every ΔW."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_reader import load_whole, open_pipeline
from layer_files import Layer, Layers, assert_same_delta, contents, named, random_layers, read_layers, save_universal
from tiny_models import layout_of

from lora_forge.cli.main import main
from lora_forge.clip_unet.family import Family
from lora_forge.files.formats import FORMATS


def converted(source: Path, output: Path, format: str, *options: str) -> Path:
    assert main(["convert", str(source), str(output), "--to", format, *options]) == 0
    return named(output, format)


@pytest.fixture(scope="module")
def pipe(family: Family, model_folder: Path) -> Any:
    return open_pipeline(family.name, model_folder)


@pytest.fixture(scope="module")
def with_convolutions(pipe: Any) -> Layers:
    """Random layers for all of a tiny UNet that a LoRA can be put on, convolutions of every kind among them."""
    generator = torch.Generator().manual_seed(5)
    result: Layers = {}
    for name, module in pipe.unet.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            down = torch.randn(4, module.in_channels, *module.kernel_size, generator=generator)
            up = torch.randn(module.out_channels, 4, 1, 1, generator=generator)
            result["unet", name] = Layer(down, up, 8.0)
        if isinstance(module, torch.nn.Linear):
            down = torch.randn(4, module.in_features, generator=generator)
            result["unet", name] = Layer(down, torch.randn(module.out_features, 4, generator=generator), 8.0)
    return result


@pytest.mark.parametrize("format", FORMATS)
def test_every_layer_of_a_unet_convolutions_too_is_converted_and_its_readers_load_it_whole(
    family: Family, pipe: Any, with_convolutions: Layers, tmp_path: Path, format: str
) -> None:
    layers = with_convolutions
    assert {len(one.down.shape) for one in layers.values()} == {2, 4}
    source = save_universal(tmp_path / "a", family.name, layers, layout_of(family.name).metadata)
    output = converted(source, tmp_path / "b", format)
    found = read_layers(output, family.name, layers)
    assert all(found[key].down.shape == one.down.shape for key, one in layers.items())
    assert_same_delta(found, layers)
    if format == "peft":
        assert load_peft(pipe.unet, output / "unet", layers) == len(layers)
    else:
        outside = {key for key in layers if "embedding" in key[1] or key[1] in ("conv_in", "conv_out")}
        loaded = load_whole(pipe, output, without=set(family.encoders))
        assert layers.keys() - outside <= loaded.keys()
        for key, one in loaded.items():
            delta = one.scaling * one.lora_B.double().flatten(1) @ one.lora_A.double().flatten(1)
            torch.testing.assert_close(delta, layers[key].delta, rtol=1e-9, atol=1e-9)
    assert contents(converted(output, tmp_path / "c", "safetensors")) == contents(source)


@pytest.mark.parametrize("format", ["safetensors", "diffusers"])
@pytest.mark.parametrize("alpha", [8.0, 3.0])
def test_diffusers_loads_every_layer_of_what_is_written_with_the_same_delta(
    model: str, family: Family, pipe: Any, tmp_path: Path, format: str, alpha: float
) -> None:
    layers = random_layers(model, alpha=alpha)
    other = "diffusers" if format == "safetensors" else "peft"
    source = converted(save_universal(tmp_path / "a", family.name, layers), tmp_path / "b", other)
    loaded = load_whole(pipe, converted(source, tmp_path / "c.safetensors", format))
    assert loaded.keys() == layers.keys()
    for key, one in loaded.items():
        torch.testing.assert_close(one.delta.double(), layers[key].delta, rtol=1e-5, atol=1e-5)


def load_peft(module: Any, folder: Path, layers: Layers) -> int:
    """Load an adapter through PEFT and compare each layer's ΔW; how many there are."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted: Any = PeftModel.from_pretrained(copy.deepcopy(module), str(folder))
    count = 0
    for path, part in adapted.base_model.model.named_modules():
        if hasattr(part, "get_delta_weight"):
            names = [(folder.name, name) for name in (path, f"text_model.{path}")]
            (key,) = [name for name in names if name in layers]
            delta = part.get_delta_weight("default").double().flatten(1)
            torch.testing.assert_close(delta, layers[key].delta, rtol=1e-5, atol=1e-5)
            count += 1
    return count


@pytest.mark.parametrize("alpha", [8.0, 2.5])
def test_peft_loads_every_component_of_a_folder_with_the_same_delta(
    model: str, family: Family, pipe: Any, tmp_path: Path, alpha: float
) -> None:
    layers = random_layers(model, alpha=alpha)
    source = save_universal(tmp_path / "a.safetensors", family.name, layers)
    folder = converted(source, tmp_path / "b", "peft")
    assert {one.name for one in folder.iterdir()} == set(family.components)
    for component in family.components:
        count = load_peft(getattr(pipe, component), folder / component, layers)
        assert count == sum(key[0] == component for key in layers)
        assert sorted(one.name for one in (folder / component).iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
