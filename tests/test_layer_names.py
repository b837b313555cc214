"""What layers are called in files, over the whole architecture of the full-size SDXL (no weights)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_forge.builtin.backends import SdxlOptions
from lora_forge.builtin.sdxl.backend import open_sdxl
from lora_forge.builtin.sdxl.sources import CONFIGS
from lora_forge.contracts import BackendRequest
from lora_forge.errors import LoraForgeError
from lora_forge.files.names import diffusers_name, missing_siblings, universal_name

# Of published SDXL LoRA and LyCORIS files: every layer that their makers' tools have a name for.
REAL_NAMES = frozenset((Path(__file__).parent / "data" / "real_sdxl_layer_names.txt").read_text().split())
CONVOLUTIONS = ("_in_layers_2", "_out_layers_3", "_skip_connection", "_op", "_conv")

Key = tuple[str, str]


@pytest.fixture(scope="module")
def layers() -> dict[Key, tuple[int, int]]:
    """`[out, in]` of every linear layer within the blocks of SDXL base."""
    backend = open_sdxl(BackendRequest(str(CONFIGS), "cpu", "float32"), SdxlOptions())
    return {
        (component, layer): size
        for component, sizes in backend.architecture().items()
        for layer, size in sizes.items()
        if backend.target_groups["all"](layer)
    }


@pytest.fixture(scope="module")
def unet_config() -> Any:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(CONFIGS / "unet")).config


def test_every_layer_of_sdxl_has_a_name_of_its_own(layers: dict[Key, tuple[int, int]]) -> None:
    counts = {c: sum(component == c for component, _ in layers) for c in ("text_encoder", "text_encoder_2", "unet")}
    assert counts == {"text_encoder": 72, "text_encoder_2": 192, "unet": 739}
    assert len({universal_name("sdxl", *key) for key in layers}) == len(layers)


def test_the_names_are_those_of_published_files(layers: dict[Key, tuple[int, int]]) -> None:
    names = {universal_name("sdxl", *key) for key in layers}
    assert names <= REAL_NAMES
    assert all(name.endswith(CONVOLUTIONS) for name in REAL_NAMES - names)


def test_diffusers_own_reader_finds_the_right_layer_behind_every_name(
    layers: dict[Key, tuple[int, int]], unet_config: Any
) -> None:
    state = {}
    for number, (key, (out_features, in_features)) in enumerate(layers.items()):
        name = universal_name("sdxl", *key)
        state[f"{name}.lora_down.weight"] = torch.full((1, in_features), float(number))
        state[f"{name}.lora_up.weight"] = torch.full((out_features, 1), float(number))
        state[f"{name}.alpha"] = torch.tensor(float(number))
    found, alphas = _read(state, unet_config)

    assert len(found) == 2 * len(layers)
    for number, (key, (out_features, in_features)) in enumerate(layers.items()):
        name = diffusers_name(*key)
        assert torch.equal(found[f"{name}.lora_A.weight"], torch.full((1, in_features), float(number)))
        assert torch.equal(found[f"{name}.lora_B.weight"], torch.full((out_features, 1), float(number)))
    assert sorted(alphas.values()) == list(range(len(layers)))


def test_diffusers_own_reader_takes_diffusers_spelling_as_it_is(
    layers: dict[Key, tuple[int, int]], unet_config: Any
) -> None:
    state = {}
    for key, (out_features, in_features) in layers.items():
        state[f"{diffusers_name(*key)}.lora_A.weight"] = torch.zeros(1, in_features)
        state[f"{diffusers_name(*key)}.lora_B.weight"] = torch.zeros(out_features, 1)
    found, alphas = _read(state, unet_config)
    assert found.keys() == state.keys()
    assert not alphas


def _read(state: dict[str, torch.Tensor], unet_config: Any) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """What diffusers reads, under the names its own loading gives it in the end."""
    from diffusers import StableDiffusionXLPipeline
    from diffusers.utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    read, alphas = StableDiffusionXLPipeline.lora_state_dict(dict(state), unet_config=unet_config)
    unet = {name: tensor for name, tensor in read.items() if name.startswith("unet.")}
    text = {name: tensor for name, tensor in read.items() if name not in unet}
    found = {
        **convert_unet_state_dict_to_peft(unet),
        **convert_state_dict_to_peft(convert_state_dict_to_diffusers(text)),
    }
    return found, alphas or {}


def test_embeddings_outside_the_blocks_are_named_as_in_the_original_checkpoint() -> None:
    assert universal_name("sdxl", "unet", "time_embedding.linear_1") == "lora_unet_time_embed_0"
    assert universal_name("sdxl", "unet", "add_embedding.linear_2") == "lora_unet_label_emb_0_2"


@pytest.mark.parametrize(
    ("family", "component", "layer", "named"),
    [
        ("sdxl", "unet", "encoder_hid_proj.0", "unet.encoder_hid_proj.0"),
        ("sdxl", "vae", "encoder.conv_in", "vae.encoder.conv_in"),
        ("else", "unet", "mid_block.attentions.0.proj_in", "'else'"),
    ],
)
def test_what_the_layout_has_no_name_for_is_an_error_that_names_it(
    family: str, component: str, layer: str, named: str
) -> None:
    with pytest.raises(LoraForgeError, match="universal layout") as caught:
        universal_name(family, component, layer)
    assert named in str(caught.value)


def test_what_an_attention_lacks_is_found_with_a_sibling_of_its_size() -> None:
    block = "text_model.encoder.layers.1.self_attn"
    missing = missing_siblings([f"{block}.q_proj", f"{block}.v_proj", "text_model.encoder.layers.1.mlp.fc1"])
    assert missing.keys() == {f"{block}.k_proj", f"{block}.out_proj"}
    assert set(missing.values()) <= {f"{block}.q_proj", f"{block}.v_proj"}
    whole = [f"{block}.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj", "out_proj")]
    assert missing_siblings([*whole, "down_blocks.0.attentions.0.proj_in"]) == {}
