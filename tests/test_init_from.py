"""`init_from`: starting from an earlier LoRA file, whichever saver wrote it, with whatever alpha."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import layout_of, target_layers

import lora_forge
from lora_forge.builtin import savers
from lora_forge.cli.main import main
from lora_forge.clip_unet.family import Family
from lora_forge.contracts import LoraWeights, SaveRequest
from lora_forge.errors import LoraFileError, ModelError, UsageError

SAVERS = {"safetensors": savers.universal, "diffusers": savers.diffusers}
PROMPT = "a steampunk owl"
Q_PROJ = "text_model.encoder.layers.0.self_attn.q_proj"
FILE_PREFIX = {"sdxl": "lora_te1", "sd15": "lora_te"}


@pytest.fixture(scope="module")
def fresh(model: str) -> LoraWeights:
    """What the initializer makes of a tiny model's target layers."""
    return lora_forge.run(PROMPT, model, iterations=0).weights


@pytest.fixture(scope="module")
def trained(fresh: LoraWeights) -> LoraWeights:
    """Weights with no zero in A or B."""
    generator = torch.Generator().manual_seed(1)
    return {
        component: {
            layer: {name: torch.randn(value.shape, generator=generator) for name, value in pair.items()}
            for layer, pair in layers.items()
        }
        for component, layers in fresh.items()
    }


@pytest.fixture(scope="module")
def q_proj(family: Family) -> str:
    """What a file calls the first target layer of the first encoder."""
    return f"{FILE_PREFIX[family.name]}_{Q_PROJ.replace('.', '_')}"


def written(
    path: Path, family: Family, weights: LoraWeights, *, saver: str = "safetensors", alpha: float = 4.0
) -> Path:
    rank = next(iter(next(iter(weights.values())).values()))["lora_A"].shape[0]
    SAVERS[saver](SaveRequest(path, weights, rank, alpha, family.name, PROMPT, {}, layout_of(family.name)))
    return path


def assert_same_deltas(one: LoraWeights, alpha: float, other: LoraWeights, other_alpha: float) -> None:
    assert one.keys() == other.keys()
    for component, layers in one.items():
        assert layers.keys() == other[component].keys()
        for layer, pair in layers.items():
            expected = other_alpha * other[component][layer]["lora_B"] @ other[component][layer]["lora_A"]
            difference = alpha * pair["lora_B"] @ pair["lora_A"] - expected
            assert float(difference.norm()) <= 1e-6 * float(expected.norm()), (component, layer)


@pytest.mark.parametrize("saver", SAVERS)
def test_a_file_of_the_same_alpha_comes_back_to_the_bit(
    model: str, family: Family, trained: LoraWeights, tmp_path: Path, saver: str
) -> None:
    file = written(tmp_path / "earlier.safetensors", family, trained, saver=saver)
    start = lora_forge.run(PROMPT, model, iterations=0, init_from=file)
    for component, layers in trained.items():
        for layer, pair in layers.items():
            assert torch.equal(start.weights[component][layer]["lora_A"], pair["lora_A"])
            assert torch.equal(start.weights[component][layer]["lora_B"], pair["lora_B"])


@pytest.mark.parametrize(("file_alpha", "run_alpha"), [(10.0, 4.0), (4.0, 10.0), (3.0, 7.0)])
@pytest.mark.parametrize("saver", SAVERS)
def test_the_delta_is_kept_whatever_alpha_the_file_and_the_run_have(
    model: str, family: Family, trained: LoraWeights, tmp_path: Path, saver: str, file_alpha: float, run_alpha: float
) -> None:
    file = written(tmp_path / "earlier.safetensors", family, trained, saver=saver, alpha=file_alpha)
    start = lora_forge.run(PROMPT, model, iterations=0, alpha=run_alpha, init_from=file)
    assert_same_deltas(start.weights, run_alpha, trained, file_alpha)


@pytest.mark.parametrize("saver", SAVERS)
def test_a_run_goes_on_from_another_run_s_file(model: str, tmp_path: Path, saver: str) -> None:
    file = tmp_path / "earlier.safetensors"
    earlier = lora_forge.run(PROMPT, model, iterations=3, alpha=10, saver=saver, output=file)
    start = lora_forge.run(PROMPT, model, iterations=0, alpha=10, init_from=file, l2=0)
    later = lora_forge.run(PROMPT, model, iterations=3, alpha=10, init_from=file, l2=0)

    assert_same_deltas(start.weights, 10, earlier.weights, 10)
    assert start.loss_after == pytest.approx(earlier.after.terms["embedding_magnitude"], rel=1e-6)
    assert later.loss_before == start.loss_after
    assert later.loss_after < later.loss_before


def test_layers_the_file_lacks_come_from_the_initializer(
    model: str, family: Family, fresh: LoraWeights, trained: LoraWeights, tmp_path: Path
) -> None:
    unet = dict(list(trained["unet"].items())[:3])
    file = written(tmp_path / "part.safetensors", family, {"text_encoder": trained["text_encoder"], "unet": unet})
    start = lora_forge.run(PROMPT, model, iterations=0, init_from=file).weights
    for component, layers in fresh.items():
        for layer, pair in layers.items():
            in_file = component == "text_encoder" or layer in unet
            expected = trained[component][layer] if in_file else pair
            assert torch.equal(start[component][layer]["lora_A"], expected["lora_A"])
            assert torch.equal(start[component][layer]["lora_B"], expected["lora_B"])


def test_a_file_of_half_precision_is_read_as_float32(
    model: str, family: Family, trained: LoraWeights, tmp_path: Path
) -> None:
    file = written(tmp_path / "earlier.safetensors", family, trained)
    halves = {name: tensor.half() for name, tensor in load_file(file).items()}
    save_file(halves, file)
    start = lora_forge.run(PROMPT, model, iterations=0, init_from=file).weights
    for component, layers in trained.items():
        for layer, pair in layers.items():
            assert torch.equal(start[component][layer]["lora_B"], pair["lora_B"].half().float())


def test_layers_of_zeros_that_are_no_target_are_passed_over(
    model: str, family: Family, trained: LoraWeights, tmp_path: Path
) -> None:
    file = written(tmp_path / "earlier.safetensors", family, trained)
    name = f"{FILE_PREFIX[family.name]}_text_model_encoder_layers_0_mlp_fc1"
    (width, _) = target_layers(model)["text_encoder"][Q_PROJ]
    padding = {
        f"{name}.lora_down.weight": torch.zeros(4, width),
        f"{name}.lora_up.weight": torch.zeros(2 * width, 4),
        f"{name}.alpha": torch.tensor(4.0),
    }
    save_file({**load_file(file), **padding}, file)
    assert_same_deltas(lora_forge.run(PROMPT, model, iterations=0, init_from=file).weights, 4, trained, 4)


def test_another_rank_is_an_error_that_names_both_ranks(
    model: str, family: Family, trained: LoraWeights, tmp_path: Path
) -> None:
    file = written(tmp_path / "earlier.safetensors", family, trained)
    with pytest.raises(LoraFileError, match=r"rank 4.*rank 8"):
        lora_forge.run(PROMPT, model, iterations=0, rank=8, init_from=file)


def test_tensors_that_belong_to_no_target_layer_are_an_error_that_names_one(
    model: str, family: Family, trained: LoraWeights, tmp_path: Path
) -> None:
    file = written(tmp_path / "earlier.safetensors", family, trained)
    save_file({**load_file(file), "lora_unet_conv_in.lora_down.weight": torch.ones(4, 4)}, file)
    with pytest.raises(LoraFileError, match=r"'lora_unet_conv_in\.lora_down\.weight'"):
        lora_forge.run(PROMPT, model, iterations=0, init_from=file)


def test_a_layer_of_another_size_is_an_error_that_names_the_layer(
    model: str, family: Family, q_proj: str, trained: LoraWeights, tmp_path: Path
) -> None:
    file = written(tmp_path / "earlier.safetensors", family, trained)
    tensors = load_file(file)
    tensors[f"{q_proj}.lora_down.weight"] = torch.ones(4, 33)
    save_file(tensors, file)
    with pytest.raises(LoraFileError, match=r"text_encoder\.text_model\.encoder\.layers\.0\.self_attn\.q_proj"):
        lora_forge.run(PROMPT, model, iterations=0, init_from=file)


def test_half_a_pair_is_an_error(model: str, family: Family, q_proj: str, trained: LoraWeights, tmp_path: Path) -> None:
    file = written(tmp_path / "earlier.safetensors", family, trained)
    tensors = load_file(file)
    del tensors[f"{q_proj}.lora_up.weight"]
    save_file(tensors, file)
    with pytest.raises(LoraFileError, match=q_proj):
        lora_forge.run(PROMPT, model, iterations=0, init_from=file)


def test_a_file_of_none_of_the_target_layers_is_an_error(model: str, tmp_path: Path) -> None:
    file = tmp_path / "empty.safetensors"
    save_file({"something.alpha": torch.tensor(1.0)}, file)
    with pytest.raises(LoraFileError, match="none of the target layers"):
        lora_forge.run(PROMPT, model, iterations=0, init_from=file)


@pytest.mark.parametrize("saver", SAVERS)
def test_a_file_of_another_family_is_an_error(model: str, tmp_path: Path, saver: str) -> None:
    file = tmp_path / "foreign.safetensors"
    other = {"tiny_sdxl": "tiny_sd15", "tiny_sd15": "tiny_sdxl"}[model]
    lora_forge.run(PROMPT, other, iterations=1, saver=saver, output=file)
    with pytest.raises(LoraFileError, match=r"belong to no target layer|the model's layer is another size"):
        lora_forge.run(PROMPT, model, iterations=0, init_from=file)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_an_error(
    model: str, family: Family, q_proj: str, trained: LoraWeights, tmp_path: Path, value: float
) -> None:
    file = written(tmp_path / "earlier.safetensors", family, trained)
    tensors = load_file(file)
    tensors[f"{q_proj}.lora_up.weight"][0, 0] = value
    save_file(tensors, file)
    with pytest.raises((LoraFileError, ModelError), match="finite"):
        lora_forge.run(PROMPT, model, iterations=0, init_from=file)


def test_a_file_that_is_not_there_is_an_error(model: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        lora_forge.run(PROMPT, model, iterations=0, init_from=tmp_path / "none.safetensors")


@pytest.mark.parametrize("damage", ["not safetensors", "truncated", "empty"])
def test_a_broken_file_is_one_line_and_exit_2_and_nothing_is_written(
    model: str, family: Family, trained: LoraWeights, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    file = written(tmp_path / "earlier.safetensors", family, trained)
    content = file.read_bytes()
    broken = {"not safetensors": b"PK\x03\x04 a pickle, say", "truncated": content[:-1000], "empty": b""}
    file.write_bytes(broken[damage])
    output = tmp_path / "new.safetensors"

    arguments = ["run", "--prompt", PROMPT, "--model", model, "--iterations", "1"]
    assert main([*arguments, "--init-from", str(file), "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert "earlier.safetensors is not a readable safetensors file" in error
    assert "Traceback" not in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [file]
