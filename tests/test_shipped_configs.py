"""The model configs that ship hold the real architectures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_forge.builtin.sd15.backend import Sd15Backend
from lora_forge.builtin.sdxl.backend import SdxlBackend
from lora_forge.clip_unet.tiny import tiny_folder
from lora_forge.config.model import expand_targets, read_model_config, shipped_folder, shipped_names
from lora_forge.contracts import BackendRequest

Architecture = dict[str, dict[str, tuple[int, int]]]
PROJECTIONS = {"to_q", "to_k", "to_v", "to_out", "q_proj", "k_proj", "v_proj", "out_proj"}
BACKENDS = {"sdxl": SdxlBackend, "sd15": Sd15Backend}


def architecture_of(source: Path, family: str) -> Architecture:
    return BACKENDS[family].open(BackendRequest(str(source), "cpu", "float32")).architecture()


def attention_by_hand(folder: Path) -> Architecture:
    """Attention projections of the libraries' own classes, found by the names of their modules."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    with torch.device("meta"):
        models = {
            name: kind(CLIPTextConfig.from_pretrained(folder / name))
            for name, kind in kinds.items()
            if (folder / name).is_dir()
        }
        models["unet"] = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder, subfolder="unet"))
    result: Architecture = {}
    for component, model in models.items():
        layers = result.setdefault(component, {})
        for path, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and PROJECTIONS & set(path.split(".")[-2:]):
                name = path if component == "unet" or path.startswith("text_model.") else f"text_model.{path}"
                layers[name] = (module.weight.shape[0], module.weight.shape[1])
    return result


@pytest.mark.parametrize(
    ("name", "family", "counts"),
    [
        ("sdxl_base", "sdxl", {"text_encoder": 48, "text_encoder_2": 128, "unet": 560}),
        ("tiny_sdxl", "sdxl", {"text_encoder": 12, "text_encoder_2": 16, "unet": 136}),
        ("sd15", "sd15", {"text_encoder": 48, "unet": 128}),
        ("tiny_sd15", "sd15", {"text_encoder": 12, "unet": 128}),
    ],
)
def test_a_shipped_config_targets_every_attention_projection_with_its_real_dimensions(
    name: str, family: str, counts: dict[str, int]
) -> None:
    facts = BACKENDS[family].facts
    folder = tiny_folder(facts) if name == facts.tiny.name else facts.configs
    config = read_model_config(name)
    assert config.backend == family
    by_hand = attention_by_hand(folder)

    assert {component: len(layers) for component, layers in config.targets.items()} == counts
    assert {component: set(layers) for component, layers in config.targets.items()} == {
        component: set(layers) for component, layers in by_hand.items()
    }
    assert config.dimensions == by_hand
    layers = expand_targets(config, architecture_of(folder, family), rank=config.lora_rank)
    assert {(layer.key, (layer.out_features, layer.in_features)) for layer in layers} == {
        ((component, layer), size) for component, sizes in by_hand.items() for layer, size in sizes.items()
    }


def test_shipped_configs_carry_every_key_a_run_takes_from_them() -> None:
    assert shipped_names() == ["sd15", "sdxl_base", "tiny_sd15", "tiny_sdxl"]
    for name in shipped_names():
        config = read_model_config(name)
        assert (config.iterations, config.learning_rate, config.regularization_strength) == (50, 1e-4, 1e-5)
    assert read_model_config("sdxl_base").base_model == "stabilityai/stable-diffusion-xl-base-1.0"
    assert read_model_config("sd15").base_model == "stable-diffusion-v1-5/stable-diffusion-v1-5"


def test_the_full_size_stable_diffusion_1_is_clip_vit_l_and_a_unet_of_320_to_1280_channels() -> None:
    dimensions = read_model_config("sd15").dimensions
    assert set(dimensions["text_encoder"].values()) == {(768, 768)}
    widths = {layer: size for layer, size in dimensions["unet"].items() if layer.endswith("attn2.to_k")}
    assert {size[1] for size in widths.values()} == {768}
    assert {layer.rpartition(".attentions.")[0]: size[0] for layer, size in widths.items()} == {
        "down_blocks.0": 320,
        "down_blocks.1": 640,
        "down_blocks.2": 1280,
        "mid_block": 1280,
        "up_blocks.1": 1280,
        "up_blocks.2": 640,
        "up_blocks.3": 320,
    }


def test_a_config_is_the_same_by_shipped_name_and_by_path() -> None:
    for name in shipped_names():
        assert read_model_config(str(shipped_folder() / f"{name}_config.json")) == read_model_config(name)
