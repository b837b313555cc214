"""cloneofsimo's files of Stable Diffusion 1.x, whose layers are only numbered, against the models' own modules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from layer_files import Layers, read_layers
from refusals import refused
from safetensors.torch import save_file

from lora_forge.cli.main import main
from lora_forge.files.lora_file import open_lora

Capture = pytest.CaptureFixture[str]
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def listed() -> dict[str, list[tuple[str, int, int]]]:
    """(path, out, in) in the order in which cloneofsimo's tool met them, from the libraries' own models."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)  # the defaults are those of Stable Diffusion 1.x
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12))
    blocks = [name for name, _ in unet.named_modules() if name.endswith("transformer_blocks.0")]
    blocks.sort(key=lambda name: name.startswith("mid_block"))  # diffusers registered it last then
    parts = ["attn1." + one for one in _ATTENTION] + ["ff.net.0.proj"] + ["attn2." + one for one in _ATTENTION]
    paths = [f"{block}.{part}" for block in blocks for part in parts]
    encoder = [name for name, one in text.named_modules() if "self_attn." in name and isinstance(one, torch.nn.Linear)]
    order = {projection: number for number, projection in enumerate("kvqo")}
    encoder.sort(key=lambda name: (int(name.split("layers.")[1].split(".")[0]), order[name.split(".")[-1][0]]))
    found: dict[str, list[tuple[str, int, int]]] = {"unet": [], "text_encoder": []}
    for component, model, names in (("unet", unet, paths), ("text_encoder", text, encoder)):
        for name in names:
            layer = model.get_submodule(name)
            canonical = name if component == "unet" or name.startswith("text_model.") else f"text_model.{name}"
            assert isinstance(layer, torch.nn.Linear)
            found[component].append((canonical, layer.out_features, layer.in_features))
    return found


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, str], torch.Tensor]]:
    """A whole file, and ΔW of each layer."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    deltas: dict[tuple[str, str], torch.Tensor] = {}
    for component, layers in listed().items():
        for number, (path, out, into) in enumerate(layers):
            up, down = torch.randn(out, 1, generator=generator), torch.randn(1, into, generator=generator)
            tensors |= {f"{component}:{number}:up": up, f"{component}:{number}:down": down}
            deltas[component, path] = up.double() @ down.double()
    file = tmp_path_factory.mktemp("numbered") / "a.safetensors"
    save_file({**tensors, "<s1>": torch.ones(768)}, file)
    return file, deltas


def test_each_number_is_the_layer_that_the_libraries_list_there(
    numbered: tuple[Path, dict[tuple[str, str], torch.Tensor]], tmp_path: Path, capsys: Capture
) -> None:
    file, deltas = numbered
    assert {(one.component, one.layer) for one in open_lora(file).layers} == deltas.keys()
    assert "convert --drop-unknown leaves them out" in refused(capsys, "convert", file, tmp_path / "b", "--to", "peft")
    for format in ("safetensors", "diffusers"):
        output = tmp_path / f"{format}.safetensors"
        assert main(["convert", str(file), str(output), "--to", format, "--drop-unknown"]) == 0
        found: Layers = read_layers(output, "sd15", deltas)
        assert found.keys() == deltas.keys()
        assert all(torch.equal(found[key].delta, delta) for key, delta in deltas.items())


@pytest.mark.parametrize("change", ["one is missing", "one more", "another order", "another size"])
def test_numbers_that_are_not_all_of_the_model_are_refused(
    numbered: tuple[Path, dict[tuple[str, str], torch.Tensor]], tmp_path: Path, capsys: Capture, change: str
) -> None:
    from safetensors.torch import load_file

    tensors = load_file(numbered[0])
    one = {part: tensors[f"unet:143:{part}"] for part in ("up", "down")}
    if change == "one is missing":
        del tensors["unet:143:up"], tensors["unet:143:down"]
    elif change == "one more":
        tensors |= {f"unet:144:{part}": tensor.clone() for part, tensor in one.items()}
    elif change == "another order":
        for part in one:
            tensors[f"unet:0:{part}"], tensors[f"unet:143:{part}"] = one[part], tensors[f"unet:0:{part}"]
    else:
        tensors["unet:143:up"] = torch.ones(8, 1)
    file = tmp_path / "a.safetensors"
    save_file(tensors, file)
    error = refused(capsys, "convert", file, tmp_path / "b", "--to", "peft", "--drop-unknown")
    assert "its layers are only numbered, as 'unet:" in error
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
