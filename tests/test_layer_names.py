"""What layers are called in files, over the whole architectures of the full-size models (no weights)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import layout_of

from lora_forge.builtin.sd15.backend import Sd15Backend
from lora_forge.builtin.sdxl.backend import SdxlBackend
from lora_forge.contracts import BackendRequest
from lora_forge.errors import LoraForgeError
from lora_forge.files.names import diffusers_name, missing_siblings, universal_name
from lora_forge.files.spelling import read_name
from lora_forge.records import FileLayout

Key = tuple[str, str]
BACKENDS = {"sdxl": SdxlBackend, "sd15": Sd15Backend}
LAYERS_IN_BLOCKS = {
    "sdxl": {"text_encoder": 72, "text_encoder_2": 192, "unet": 739},
    "sd15": {"text_encoder": 72, "unet": 182},
}
# Convolutions and embeddings, which are no linear layers within a block. Stable Diffusion 1.x enters and leaves its
# attention blocks through convolutions, and its published files cover what is outside the blocks.
NOT_LINEAR = {
    "sdxl": ("_in_layers_2", "_out_layers_3", "_skip_connection", "_op", "_conv"),
    "sd15": ("_conv", "_conv1", "_conv2", "_conv_shortcut", "_conv_in", "_conv_out", "_proj_in", "_proj_out"),
}
OUTSIDE_THE_BLOCKS = {
    "sdxl": {"time_embedding.linear_1": "time_embed_0", "add_embedding.linear_2": "label_emb_0_2"},
    "sd15": {
        "time_embedding.linear_1": "time_embedding_linear_1",
        "time_embedding.linear_2": "time_embedding_linear_2",
    },
}


@dataclass(frozen=True)
class FullSize:
    """A full-size model: layers: `[out, in]` of every linear layer within its blocks."""

    family: str
    pipeline: str
    layout: FileLayout
    layers: dict[Key, tuple[int, int]]
    unet_config: Any


@pytest.fixture(scope="module", params=BACKENDS)
def full(request: pytest.FixtureRequest) -> FullSize:
    from diffusers import UNet2DConditionModel

    facts = BACKENDS[request.param].facts
    backend = BACKENDS[request.param].open(BackendRequest(str(facts.configs), "cpu", "float32"))
    layers = {
        (component, layer): size
        for component, sizes in backend.architecture().items()
        for layer, size in sizes.items()
        if backend.target_groups["all"](layer)
    }
    with torch.device("meta"):
        config = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(facts.configs / "unet")).config
    return FullSize(facts.name, facts.pipeline, layout_of(facts.name), layers, config)


def published(family: str) -> frozenset[str]:
    """Of published LoRA, LyCORIS and OFT files: every layer that their makers' tools have a name for."""
    return frozenset((Path(__file__).parent / "data" / f"real_{family}_layer_names.txt").read_text().split())


def test_every_layer_has_a_name_of_its_own(full: FullSize) -> None:
    expected = LAYERS_IN_BLOCKS[full.family]
    assert {c: sum(component == c for component, _ in full.layers) for c in expected} == expected
    assert len({universal_name(full.layout, *key) for key in full.layers}) == len(full.layers) == sum(expected.values())


def test_the_names_are_those_of_published_files(full: FullSize) -> None:
    names = {universal_name(full.layout, *key) for key in full.layers}
    outside = {universal_name(full.layout, "unet", layer) for layer in OUTSIDE_THE_BLOCKS[full.family]}
    real = published(full.family)
    assert names <= real
    assert all(name.endswith(NOT_LINEAR[full.family]) for name in real - names - outside)


def test_every_name_that_is_written_is_read_back_as_the_layer_it_is_of(full: FullSize) -> None:
    for key in full.layers:
        for name, end in ((universal_name(full.layout, *key), "lora_down"), (diffusers_name(*key), "lora_A")):
            read = read_name(f"{name}.{end}.weight")
            assert read is not None
            assert (read.component, read.layer, read.part) == (*key, "down")


def test_diffusers_own_reader_finds_the_right_layer_behind_every_name(full: FullSize) -> None:
    state = {}
    for number, (key, (out_features, in_features)) in enumerate(full.layers.items()):
        name = universal_name(full.layout, *key)
        state[f"{name}.lora_down.weight"] = torch.full((1, in_features), float(number))
        state[f"{name}.lora_up.weight"] = torch.full((out_features, 1), float(number))
        state[f"{name}.alpha"] = torch.tensor(float(number))
    found, alphas = _read(state, full)

    assert len(found) == 2 * len(full.layers)
    for number, (key, (out_features, in_features)) in enumerate(full.layers.items()):
        name = diffusers_name(*key)
        assert torch.equal(found[f"{name}.lora_A.weight"], torch.full((1, in_features), float(number)))
        assert torch.equal(found[f"{name}.lora_B.weight"], torch.full((out_features, 1), float(number)))
    assert sorted(alphas.values()) == list(range(len(full.layers)))


def test_diffusers_own_reader_takes_diffusers_spelling_as_it_is(full: FullSize) -> None:
    state = {}
    for key, (out_features, in_features) in full.layers.items():
        state[f"{diffusers_name(*key)}.lora_A.weight"] = torch.zeros(1, in_features)
        state[f"{diffusers_name(*key)}.lora_B.weight"] = torch.zeros(out_features, 1)
    found, alphas = _read(state, full)
    assert found.keys() == state.keys()
    assert not alphas


def _read(state: dict[str, torch.Tensor], full: FullSize) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """What diffusers reads, under the names its own loading gives it in the end."""
    import diffusers
    from diffusers.utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    pipeline = getattr(diffusers, full.pipeline)
    read, alphas = pipeline.lora_state_dict(dict(state), unet_config=full.unet_config)
    unet = {name: tensor for name, tensor in read.items() if name.startswith("unet.")}
    text = {name: tensor for name, tensor in read.items() if name not in unet}
    found = {
        **convert_unet_state_dict_to_peft(unet),
        **convert_state_dict_to_peft(convert_state_dict_to_diffusers(text)),
    }
    return found, alphas or {}


@pytest.mark.parametrize("family", OUTSIDE_THE_BLOCKS)
def test_embeddings_outside_the_blocks_are_named_as_in_the_family_s_files(family: str) -> None:
    for layer, name in OUTSIDE_THE_BLOCKS[family].items():
        assert universal_name(layout_of(family), "unet", layer) == f"lora_unet_{name}"


@pytest.mark.parametrize(
    ("family", "component", "layer", "named"),
    [
        ("sdxl", "unet", "encoder_hid_proj.0", "unet.encoder_hid_proj.0"),
        ("sdxl", "vae", "encoder.conv_in", "vae.encoder.conv_in"),
        ("sd15", "text_encoder_2", "text_model.encoder.layers.0.mlp.fc1", "text_encoder_2.text_model"),
    ],
)
def test_what_the_layout_has_no_name_for_is_an_error_that_names_it(
    family: str, component: str, layer: str, named: str
) -> None:
    with pytest.raises(LoraForgeError, match="universal layout") as caught:
        universal_name(layout_of(family), component, layer)
    assert named in str(caught.value)


def test_what_an_attention_lacks_is_found_with_a_sibling_of_its_size() -> None:
    block = "text_model.encoder.layers.1.self_attn"
    missing = missing_siblings([f"{block}.q_proj", f"{block}.v_proj", "text_model.encoder.layers.1.mlp.fc1"])
    assert missing.keys() == {f"{block}.k_proj", f"{block}.out_proj"}
    assert set(missing.values()) <= {f"{block}.q_proj", f"{block}.v_proj"}
    whole = [f"{block}.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj", "out_proj")]
    assert missing_siblings([*whole, "down_blocks.0.attentions.0.proj_in"]) == {}
