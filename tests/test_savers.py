"""Each saver's file, loaded by diffusers: every key matched, every layer's effective ΔW the one in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_reader import load_whole, open_pipeline
from layer_files import Layer
from safetensors import safe_open
from test_convert_readers import load_peft
from tiny_models import layout_of, target_layers

import lora_forge
from lora_forge.builtin import savers
from lora_forge.clip_unet.family import Family
from lora_forge.contracts import LoraWeights, SaveRequest
from lora_forge.derive import derive_model_config
from lora_forge.plugins import discover

SAVERS = {"safetensors": savers.universal, "diffusers": savers.diffusers}
PROMPT = "a „strange“ 🦉 prompt"


FILED_BY = {
    "sdxl": {
        "ss_base_model_version": "sdxl_base_v1-0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.resolution": "1024x1024",
    },
    "sd15": {
        "ss_base_model_version": "sd_v1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.resolution": "512x512",
    },
}
SPELLED = {
    "sdxl": (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_out_0",
        "lora_unet_middle_block_1_transformer_blocks_0_ff_net_0_proj",
        "lora_unet_output_blocks_0_1_proj_in",
        "lora_unet_middle_block_0_emb_layers_1",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te2_text_model_encoder_layers_3_mlp_fc2",
    ),
    "sd15": (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_out_0",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj",
        "lora_unet_mid_block_resnets_0_time_emb_proj",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te_text_model_encoder_layers_2_mlp_fc2",
    ),
}
Sizes = dict[tuple[str, str], tuple[int, int]]


@pytest.fixture(scope="module")
def pipe(family: Family, model_folder: Path) -> Any:
    return open_pipeline(family.name, model_folder)


@pytest.fixture(scope="module")
def every_block_layer(family: Family, model: str) -> Sizes:
    """`[out, in]` of every linear layer within the blocks of a tiny model."""
    config = derive_model_config(model, ["all"], discover(), backend=family.name, rank=4, alpha=4)
    return {
        (component, layer): tuple(size)
        for component in family.components
        for layer, size in config[f"layer_dimensions_{component}"].items()
    }


def random_weights(sizes: Sizes, rank: int) -> LoraWeights:
    """Random A and B, B of the UNet too, so that each layer's ΔW is a check."""
    generator = torch.Generator().manual_seed(3)
    weights: LoraWeights = {}
    for (component, layer), (out_features, in_features) in sizes.items():
        weights.setdefault(component, {})[layer] = {
            "lora_A": torch.randn(rank, in_features, generator=generator),
            "lora_B": torch.randn(out_features, rank, generator=generator),
        }
    return weights


def saved(saver: str, family: Family, path: Path, weights: LoraWeights, rank: int, alpha: float) -> Path:
    metadata = {"lora_forge": "{}"}
    request = SaveRequest(path, weights, rank, alpha, family.name, PROMPT, metadata, layout_of(family.name))
    assert not SAVERS[saver](request).padded
    return path


def contents(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("alpha", [4.0, 10.0])
def test_peft_loads_every_component_of_a_run_s_folder_with_the_delta_of_its_result(
    pipe: Any, model: str, family: Family, tmp_path: Path, alpha: float
) -> None:
    result = lora_forge.run(PROMPT, model, iterations=3, alpha=alpha, saver="peft", output=tmp_path / "run")
    layers = {
        (component, name): Layer(pair["lora_A"], pair["lora_B"], alpha)
        for component, own in result.weights.items()
        for name, pair in own.items()
    }
    for component in family.components:
        count = load_peft(getattr(pipe, component), tmp_path / "run" / component, layers)
        assert count == len(result.weights[component])


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4.0), (4, 3.0), (3, 10.0)])
@pytest.mark.parametrize("saver", SAVERS)
def test_diffusers_loads_every_layer_of_a_file_with_the_delta_it_was_made_with(
    pipe: Any, family: Family, every_block_layer: Sizes, tmp_path: Path, saver: str, rank: int, alpha: float
) -> None:
    weights = random_weights(every_block_layer, rank)
    loaded = load_whole(pipe, saved(saver, family, tmp_path / "all.safetensors", weights, rank, alpha))

    assert loaded.keys() == every_block_layer.keys()
    for (component, layer), layer_loaded in loaded.items():
        pair = weights[component][layer]
        expected = alpha / rank * pair["lora_B"] @ pair["lora_A"]
        assert torch.equal(layer_loaded.lora_A, pair["lora_A"])
        if saver == "safetensors":
            assert torch.equal(layer_loaded.lora_B, pair["lora_B"])
            assert layer_loaded.scaling == alpha / rank
            assert torch.equal(layer_loaded.delta, expected)
        assert relative(layer_loaded.delta, expected) <= 1e-6, (component, layer)


@pytest.mark.parametrize("alpha", [4.0, 10.0])
@pytest.mark.parametrize("saver", SAVERS)
def test_diffusers_loads_a_run_s_file_with_the_delta_of_its_result(
    pipe: Any, model: str, tmp_path: Path, saver: str, alpha: float
) -> None:
    output = tmp_path / "run.safetensors"
    result = lora_forge.run(PROMPT, model, iterations=3, alpha=alpha, saver=saver, output=output)
    loaded = load_whole(pipe, output)

    assert result.padded == result.dropped == ()
    assert loaded.keys() == {
        (component, layer) for component, layers in target_layers(model).items() for layer in layers
    }
    for (component, layer), layer_loaded in loaded.items():
        pair = result.weights[component][layer]
        expected = alpha / 4 * pair["lora_B"] @ pair["lora_A"]
        if component == "unet":
            assert not layer_loaded.delta.any()
            assert not expected.any()
        else:
            assert expected.any()
            assert relative(layer_loaded.delta, expected) <= 1e-6


@pytest.mark.parametrize("saver", SAVERS)
def test_lora_state_dict_reads_the_file_for_this_unet(
    pipe: Any, family: Family, every_block_layer: Sizes, tmp_path: Path, saver: str
) -> None:
    weights = random_weights(every_block_layer, 4)
    path = saved(saver, family, tmp_path / "all.safetensors", weights, 4, 10.0)
    state, alphas = type(pipe).lora_state_dict(str(path), unet_config=pipe.unet.config)

    assert len(state) == 2 * len(every_block_layer)
    if saver == "safetensors":
        assert len(alphas) == len(every_block_layer)
        assert set(alphas.values()) == {10.0}
    else:
        assert not alphas


def test_the_default_file_names_its_layers_as_every_reader_does(
    family: Family, every_block_layer: Sizes, tmp_path: Path
) -> None:
    path = saved("safetensors", family, tmp_path / "all.safetensors", random_weights(every_block_layer, 4), 4, 10.0)
    tensors, _ = contents(path)
    names = {name.removesuffix(".alpha") for name in tensors if name.endswith(".alpha")}

    assert set(SPELLED[family.name]) <= names
    assert tensors.keys() == {f"{n}{end}" for n in names for end in (".lora_down.weight", ".lora_up.weight", ".alpha")}
    assert len(names) == len(every_block_layer)
    for name in names:
        alpha = tensors[f"{name}.alpha"]
        assert (alpha.dtype, alpha.shape, alpha.item()) == (torch.float32, (), 10.0)


def test_the_diffusers_file_speaks_canonical_names_and_folds_alpha_in(
    family: Family, every_block_layer: Sizes, tmp_path: Path
) -> None:
    weights = random_weights(every_block_layer, 4)
    tensors, _ = contents(saved("diffusers", family, tmp_path / "all.safetensors", weights, 4, 10.0))

    expected = {f"{c}.{layer}.{m}.weight" for c, layer in every_block_layer for m in ("lora_A", "lora_B")}
    assert tensors.keys() == expected
    assert "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight" in tensors
    name = "text_model.encoder.layers.0.self_attn.q_proj"
    pair = weights["text_encoder"][name]
    assert torch.equal(tensors[f"text_encoder.{name}.lora_A.weight"], pair["lora_A"])
    assert torch.equal(tensors[f"text_encoder.{name}.lora_B.weight"], pair["lora_B"] * 2.5)


@pytest.mark.parametrize("saver", SAVERS)
def test_a_file_says_what_user_interfaces_file_it_by_and_how_it_was_made(
    family: Family, model: str, tmp_path: Path, saver: str
) -> None:
    output = tmp_path / "owl.safetensors"
    result = lora_forge.run(
        PROMPT, model, iterations=2, alpha=10, seed=5, saver=saver, output=output, loss="embedding_magnitude:0.5"
    )
    _, metadata = contents(output)

    assert {name: metadata[name] for name in FILED_BY[family.name]} == FILED_BY[family.name]
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.title"]
    assert metadata["ss_output_name"]
    assert metadata["modelspec.trigger_phrase"] == PROMPT
    assert json.loads(metadata["ss_tag_frequency"]) == {"prompt": {PROMPT: 1}}
    assert metadata["ss_network_module"] == "networks.lora"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "10")
    assert metadata["ss_v2"] == "False"
    assert json.loads(metadata["ss_network_args"]) == {}
    assert "lora_adapter_metadata" not in metadata
    assert {name: metadata[name] for name in result.metadata} == result.metadata
    _check_record(json.loads(metadata["lora_forge"]), result, model, saver)


def _check_record(record: dict[str, Any], result: lora_forge.RunResult, model: str, saver: str) -> None:
    run = record["run"]
    config = json.loads((Path(__file__).parent.parent / "model_config" / f"{model}_config.json").read_text())
    assert run["prompt"] == PROMPT
    assert run["model"] == run["base_model"] == model
    assert (run["seed"], run["iterations"], run["rank"], run["alpha"], run["l2"]) == (5, 2, 4, 10, 1e-5)
    assert run["model_config_sha256"] == _digest(config)
    assert [(term["name"], term["weight"]) for term in run["loss"]] == [("embedding_magnitude", 0.5)]
    assert run["optimizer"]["options"]["lr"] == 1e-4
    assert run["saver"]["name"] == saver
    for supplied in (*run["loss"], run["initializer"], run["optimizer"], run["saver"], run["backend"]):
        assert supplied["distribution"] == "lora-forge"
        assert supplied["version"] == lora_forge.__version__
        assert supplied["module"].startswith("lora_forge.builtin.")
    assert record["versions"].keys() >= {"lora-forge", "python", "torch", "transformers", "diffusers", "peft"}
    assert record["versions"]["torch"] == torch.__version__
    assert record["effect"] == json.loads(json.dumps(result.effect.as_dict()))


def _digest(config: dict[str, Any]) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
