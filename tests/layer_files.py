"""LoRA files of every spelling made from layers, and read back naively: names from tables, ΔW in float64."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import layout_of, target_layers

from lora_forge.files.names import universal_name

Key = tuple[str, str]


class Layer(NamedTuple):
    """ΔW is alpha / rank · up @ down; alpha None: the file has none."""

    down: torch.Tensor
    up: torch.Tensor
    alpha: float | torch.Tensor | None

    @property
    def delta(self) -> torch.Tensor:
        down, up = self.down.double().flatten(1), self.up.double().flatten(1)
        alpha = down.shape[0] if self.alpha is None else float(self.alpha)
        return alpha / down.shape[0] * up @ down

    @property
    def magnitude(self) -> torch.Tensor:
        """What each number of ΔW is a sum of, without the signs: the scale of its rounding."""
        down, up = self.down.double().flatten(1).abs(), self.up.double().flatten(1).abs()
        alpha = down.shape[0] if self.alpha is None else float(self.alpha)
        return abs(alpha) / down.shape[0] * up @ down


Layers = dict[Key, Layer]


def random_layers(
    model: str,
    *,
    rank: int = 4,
    alpha: float | torch.Tensor | None = 4.0,
    dtype: torch.dtype = torch.float32,
    chosen: Callable[[str], bool] = lambda layer: True,
    seed: int = 0,
) -> Layers:
    """Random A and B for the target layers of a tiny model."""
    generator = torch.Generator().manual_seed(seed)
    return {
        (component, layer): Layer(
            torch.randn(rank, size[1], generator=generator).to(dtype),
            torch.randn(size[0], rank, generator=generator).to(dtype),
            alpha,
        )
        for component, sizes in target_layers(model).items()
        for layer, size in sizes.items()
        if chosen(layer)
    }


def save_kohya(
    path: Path, layers: Layers, name: Callable[[str, str], str], metadata: Mapping[str, str] | None = None
) -> Path:
    tensors = {}
    for key, layer in layers.items():
        tensors[f"{name(*key)}.lora_down.weight"] = layer.down
        tensors[f"{name(*key)}.lora_up.weight"] = layer.up
        if layer.alpha is not None:
            alpha = layer.alpha if isinstance(layer.alpha, torch.Tensor) else torch.tensor(layer.alpha)
            tensors[f"{name(*key)}.alpha"] = alpha.clone()
    save_file(tensors, path, dict(metadata or {}))
    return path


def save_universal(path: Path, family: str, layers: Layers, metadata: Mapping[str, str] | None = None) -> Path:
    return save_kohya(path, layers, lambda *key: universal_name(layout_of(family), *key), metadata)


def save_diffusers(path: Path, layers: Layers, metadata: Mapping[str, str] | None = None) -> Path:
    tensors = {}
    for (component, layer), one in layers.items():
        tensors[f"{component}.{layer}.lora_A.weight"], tensors[f"{component}.{layer}.lora_B.weight"] = one.down, one.up
    save_file(tensors, path, dict(metadata or {}))
    return path


def save_peft(path: Path, layers: Layers, config: Mapping[str, object], metadata: Mapping[str, str]) -> Path:
    for component in {component for component, _ in layers}:
        folder = path / component
        folder.mkdir(parents=True)
        tensors = {}
        for (its, layer), one in layers.items():
            if its == component:
                tensors[f"base_model.model.{layer}.lora_A.weight"] = one.down
                tensors[f"base_model.model.{layer}.lora_B.weight"] = one.up
        save_file(tensors, folder / "adapter_model.safetensors", dict(metadata))
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return path


def read_layers(path: Path, family: str, keys: Mapping[Key, object]) -> Layers:
    """The layers among `keys` that a file of ours has, in whichever format."""
    if path.is_dir():
        return _read_peft(path, keys)
    tensors, result = load_file(path), {}
    for component, layer in keys:
        name = universal_name(layout_of(family), component, layer)
        if f"{name}.lora_down.weight" in tensors:
            down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
            result[component, layer] = Layer(down, up, tensors[f"{name}.alpha"])
        name = f"{component}.{layer}"
        if f"{name}.lora_A.weight" in tensors:
            pair = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
            result[component, layer] = Layer(*pair, None)
    return result


def _read_peft(path: Path, keys: Mapping[Key, object]) -> Layers:
    result = {}
    for folder in path.iterdir():
        tensors = load_file(folder / "adapter_model.safetensors")
        config = json.loads((folder / "adapter_config.json").read_text())
        for component, layer in keys:
            for name in (layer, layer.removeprefix("text_model.")):
                if component == folder.name and f"base_model.model.{name}.lora_A.weight" in tensors:
                    parts = [tensors[f"base_model.model.{name}.lora_{matrix}.weight"] for matrix in "AB"]
                    result[component, layer] = Layer(parts[0], parts[1], config["lora_alpha"])
    return result


def contents(path: Path) -> dict[str, tuple[torch.dtype, bytes]]:
    """Every tensor of a file or a folder of adapters, by its key, to the byte."""
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    return {
        f"{file.parent.name if path.is_dir() else ''} {key}": (tensor.dtype, raw(tensor))
        for file in files
        for key, tensor in load_file(file).items()
    }


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def metadata_of(path: Path) -> dict[str, str]:
    file = next(iter(sorted(path.rglob("*.safetensors")))) if path.is_dir() else path
    with safe_open(file, framework="pt") as opened:
        return opened.metadata() or {}


def assert_same_delta(one: Layers, other: Layers, *, units: float = 0, eps: float = 2**-23) -> None:
    """ΔW of every layer in float64; units: how many in the last place the terms of each number may differ by."""
    assert one.keys() == other.keys()
    for key, layer in one.items():
        difference = (layer.delta - other[key].delta).abs()
        # Between two powers of two a unit in the last place is eps / 2 to eps of the number; and float64 itself rounds.
        assert bool((difference <= (units * eps / 2 + 1e-15) * layer.magnitude).all()), key


def named(output: Path, format: str) -> Path:
    """What is written where `output` was asked for."""
    return (
        output
        if format == "peft" or output.suffix == ".safetensors"
        else output.with_name(f"{output.name}.safetensors")
    )
