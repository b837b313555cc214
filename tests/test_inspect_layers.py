"""What `inspect` measures of a layer, against ΔW made whole by torch, for every kind and every place alpha is in."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import Q_PROJ, TO_K, numbers, pair, saved

import lora_forge
from lora_forge.errors import LoraFileError
from lora_forge.files.arrays import layer_alpha, read_array
from lora_forge.files.lora_file import open_lora
from lora_forge.inspection.layers import LayerReport, report_layers

Tensors = dict[str, torch.Tensor]


def product(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return torch.einsum("or,ri...->oi...", up.reshape(up.shape[:2]), down)


def two_factors(tensors: Tensors, name: str) -> torch.Tensor:
    if name in tensors:
        return tensors[name]
    return tensors[f"{name}_a"] @ tensors[f"{name}_b"]


def kron(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.kron(one.reshape(*one.shape, *[1] * (other.ndim - 2)), other)


def lora(tensors: Tensors) -> torch.Tensor:
    return product(tensors["lora_up.weight"], tensors["lora_down.weight"])


def tucker(tensors: Tensors) -> torch.Tensor:
    up, mid, down = (tensors[f"lora_{part}.weight"] for part in ("up", "mid", "down"))
    return torch.einsum("or,rshw,si->oihw", up[..., 0, 0], mid, down[..., 0, 0])


def loha(tensors: Tensors) -> torch.Tensor:
    return two_factors(tensors, "hada_w1") * two_factors(tensors, "hada_w2")


def lokr(tensors: Tensors) -> torch.Tensor:
    return kron(two_factors(tensors, "lokr_w1"), two_factors(tensors, "lokr_w2"))


def hada(out: int, inputs: int, rank: int) -> Tensors:
    shapes = {"w1_a": (out, rank), "w1_b": (rank, inputs), "w2_a": (out, rank), "w2_b": (rank, inputs)}
    return {f"hada_{name}": numbers(*shape, seed=len(name)) for name, shape in shapes.items()}


KINDS: dict[str, tuple[str, Tensors, Callable[[Tensors], torch.Tensor], int | None]] = {
    "linear": ("lora", {"lora_down.weight": numbers(3, 9), "lora_up.weight": numbers(7, 3)}, lora, 3),
    "linear of more rank than size": (
        "lora",
        {"lora_down.weight": numbers(12, 5), "lora_up.weight": numbers(4, 12)},
        lora,
        12,
    ),
    "convolution": ("lora", {"lora_down.weight": numbers(3, 5, 3, 3), "lora_up.weight": numbers(7, 3, 1, 1)}, lora, 3),
    "convolution in three parts": (
        "lora",
        {
            "lora_down.weight": numbers(3, 5, 1, 1),
            "lora_mid.weight": numbers(4, 3, 3, 3),
            "lora_up.weight": numbers(7, 4, 1, 1),
        },
        tucker,
        3,
    ),
    "loha": ("loha", hada(9, 8, 2), loha, 2),
    "loha of much rank": ("loha", hada(9, 8, 4), loha, 4),
    "lokr of whole matrices": ("lokr", {"lokr_w1": numbers(2, 3), "lokr_w2": numbers(5, 4)}, lokr, None),
    "lokr of a product": (
        "lokr",
        {"lokr_w1": numbers(2, 3), "lokr_w2_a": numbers(5, 2), "lokr_w2_b": numbers(2, 4)},
        lokr,
        2,
    ),
    "lokr of two products": (
        "lokr",
        {
            **{"lokr_w1_a": numbers(4, 3), "lokr_w1_b": numbers(3, 5)},
            **{"lokr_w2_a": numbers(5, 2), "lokr_w2_b": numbers(2, 4)},
        },
        lokr,
        2,
    ),
    "lokr of a convolution": ("lokr", {"lokr_w1": numbers(2, 3), "lokr_w2": numbers(5, 4, 3, 3)}, lokr, None),
    "full": ("full", {"diff": numbers(6, 5)}, lambda tensors: tensors["diff"], None),
    "full convolution": ("full", {"diff": numbers(6, 5, 3, 3)}, lambda tensors: tensors["diff"], None),
    "full vector": ("full", {"diff": numbers(6), "diff_b": numbers(6)}, lambda tensors: tensors["diff"], None),
}


def entropy_rank(delta: torch.Tensor) -> float:
    singular = torch.linalg.svdvals(delta.double().reshape(delta.shape[0], -1))
    shares = singular[singular > 1e-12 * singular.max()] / singular.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


def only_layer(path: Path) -> LayerReport:
    (report,) = report_layers(open_lora(path))
    return report


@pytest.mark.parametrize("alpha", [None, 1.0, -6.0])
@pytest.mark.parametrize("how", KINDS)
def test_the_norm_and_the_effective_rank_are_those_of_delta_made_whole(
    tmp_path: Path, how: str, alpha: float | None
) -> None:
    kind, tensors, whole, rank = KINDS[how]
    stored = {f"{TO_K}.{name}": tensor for name, tensor in tensors.items()}
    if alpha is not None:
        stored[f"{TO_K}.alpha"] = torch.tensor(alpha)
    report = only_layer(saved(tmp_path / "a.safetensors", stored))
    delta = whole({name: tensor.double() for name, tensor in tensors.items()})
    delta = delta * (alpha / rank if alpha is not None and rank else 1.0)

    assert (report.kind, report.rank, report.alpha, report.faults) == (kind, rank, alpha, ())
    assert report.shape == (delta.shape[0], math.prod(delta.shape[1:]))
    assert report.delta_norm == pytest.approx(float(delta.norm()), rel=1e-6)
    assert report.effective_rank == pytest.approx(entropy_rank(delta), rel=1e-6)


@pytest.mark.parametrize("rank", [1, 8, 64, 400])
def test_a_layer_as_large_as_sdxls_is_measured_as_torch_measures_it(tmp_path: Path, rank: int) -> None:
    tensors = pair(TO_K, 1280, 2048, rank=rank, alpha=4.0)
    report = only_layer(saved(tmp_path / "a.safetensors", tensors))
    delta = 4.0 / rank * tensors[f"{TO_K}.lora_up.weight"].double() @ tensors[f"{TO_K}.lora_down.weight"].double()
    assert report.delta_norm == pytest.approx(float(delta.norm()), rel=1e-6)
    assert report.effective_rank == pytest.approx(entropy_rank(delta), rel=1e-6)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_numbers_of_every_dtype_are_read_as_torch_reads_them(tmp_path: Path, dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8)
    tensor = every.view(dtype) if dtype.itemsize == 1 else numbers(4, 6, dtype=dtype)
    name = f"{TO_K}.lora_down.weight"
    lora = open_lora(saved(tmp_path / "a.safetensors", {name: tensor}))
    array = torch.from_numpy(read_array(lora, lora.layers[0].parts["down"]))
    torch.testing.assert_close(array, tensor.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["dora", "ia3", "oft", "glora", "boft"])
def test_what_depends_on_the_base_weights_is_named_and_has_no_norm(tmp_path: Path, kind: str) -> None:
    parts: dict[str, Tensors] = {
        "dora": {
            "lora_down.weight": numbers(2, 5),
            "lora_up.weight": numbers(4, 2),
            "dora_scale": numbers(4, 1),
        },
        "ia3": {"on_input": torch.ones(1), "weight": numbers(4)},
        "oft": {"oft_diag": numbers(2, 3, 3)},
        "glora": {"a1.weight": numbers(4, 2), "a2.weight": numbers(2, 4)},
        "boft": {"boft_blocks": numbers(1, 2, 3, 3)},
    }
    stored = {f"{TO_K}.{name}": tensor for name, tensor in parts[kind].items()}
    report = only_layer(saved(tmp_path / "a.safetensors", stored))
    assert (report.kind, report.delta_norm, report.effective_rank) == (kind, None, None)
    assert not report.does_nothing


@pytest.mark.parametrize("zero", ["lora_up.weight", "lora_down.weight"])
def test_a_layer_of_zeros_does_nothing(tmp_path: Path, zero: str) -> None:
    tensors = pair(TO_K, 4, 5)
    tensors[f"{TO_K}.{zero}"].zero_()
    report = only_layer(saved(tmp_path / "a.safetensors", tensors))
    assert report.does_nothing
    assert (report.delta_norm, report.effective_rank, report.faults) == (0, 0, ("does nothing",))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"alpha": torch.tensor(0.0)}, "alpha is 0"),
        ({"alpha": torch.tensor(math.nan)}, "alpha is NaN"),
        ({"alpha": torch.tensor(math.inf)}, "alpha is infinite"),
        ({"alpha": torch.ones(2)}, f"'{TO_K}.alpha' is not one number"),
        ({"lora_up.weight": torch.full((4, 2), math.nan)}, f"'{TO_K}.lora_up.weight' holds NaN"),
        ({"lora_down.weight": torch.full((2, 5), -math.inf)}, f"'{TO_K}.lora_down.weight' holds infinity"),
        ({"lora_up.weight": torch.full((4, 2), 1e300, dtype=torch.float64)}, "holds infinity"),
        ({"lora_up.weight": torch.ones(4, 2, dtype=torch.bool)}, "is BOOL, which is not read"),
    ],
)
def test_what_is_wrong_with_numbers_is_told_of_the_layer(
    tmp_path: Path, change: dict[str, torch.Tensor], fault: str
) -> None:
    tensors = pair(TO_K, 4, 5) | {f"{TO_K}.{name}": tensor for name, tensor in change.items()}
    report = only_layer(saved(tmp_path / "a.safetensors", tensors))
    assert fault in " ".join(report.faults)
    assert report.delta_norm in (None, 0)


def test_a_tensor_larger_than_any_layer_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_forge.files.arrays.LARGEST_TENSOR", 9)
    report = only_layer(saved(tmp_path / "a.safetensors", pair(TO_K, 4, 5)))
    assert "is too large to be a LoRA's: 10 numbers" in report.faults[0]


def test_alpha_in_diffusers_metadata_counts_for_files_of_diffusers_alone(tmp_path: Path) -> None:
    told = {"unet.lora_alpha": 8, "unet.alpha_pattern": {"mid_block.a": 3}, "unet.use_rslora": False, "unet.r": 2}
    metadata = {"lora_adapter_metadata": json.dumps(told)}
    names = [f"{name}.lora_{part}.weight" for name in ("unet.mid_block.a", "unet.mid_block.b") for part in "AB"]
    tensors = {name: numbers(2, 2) for name in names}
    reports = report_layers(open_lora(saved(tmp_path / "a.safetensors", tensors, metadata)))
    assert [report.alpha for report in reports] == [3, 8]
    assert only_layer(saved(tmp_path / "b.safetensors", pair(TO_K, 4, 5, alpha=None), metadata)).alpha is None


@pytest.mark.parametrize(
    "metadata", ["", "[]", "{", '{"unet.lora_alpha": "x"}', "[" * 50_000, '{"unet.lora_alpha": []}']
)
def test_metadata_that_is_not_legible_says_no_alpha(tmp_path: Path, metadata: str) -> None:
    tensors = {"unet.mid_block.a.lora_A.weight": numbers(2, 2), "unet.mid_block.a.lora_B.weight": numbers(2, 2)}
    report = only_layer(saved(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": metadata}))
    assert (report.alpha, report.faults) == (None, ())


@pytest.mark.parametrize("rslora", [False, True])
def test_a_folder_of_pefts_is_measured_as_peft_itself_applies_it(tmp_path: Path, rslora: bool) -> None:
    from peft import LoraConfig, get_peft_model

    model = torch.nn.ModuleDict({name: torch.nn.Linear(6, 5) for name in ("one", "two", "three")})
    config: Any = LoraConfig(
        r=4, lora_alpha=3, use_rslora=rslora, target_modules=["one", "two"], alpha_pattern={"two": 10}
    )
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "unet")
    for path in (tmp_path, tmp_path / "unet"):
        lora = open_lora(path)
        reports = {
            layer.name.rpartition(".")[2]: report
            for layer, report in zip(lora.layers, report_layers(lora), strict=True)
        }
        assert (lora.format, set(reports)) == ("peft", {"one", "two"})
        for name, report in reports.items():
            delta = adapted.base_model.model[name].get_delta_weight("default").detach()
            assert report.delta_norm == pytest.approx(float(delta.norm()), rel=1e-5)
            assert report.component == "unet"


def test_a_broken_config_of_pefts_is_an_error_that_names_it(tmp_path: Path) -> None:
    saved(tmp_path / "adapter_model.safetensors", {"base_model.model.a.lora_A.weight": numbers(2, 2)})
    for content in ("", "[]", "{}", '{"lora_alpha": null}', "[" * 50_000, '{"lora_alpha": 1, "alpha_pattern": [1]}'):
        (tmp_path / "adapter_config.json").write_text(content)
        with pytest.raises(LoraFileError, match=r"adapter_config\.json.*lora_alpha cannot be read"):
            open_lora(tmp_path)


@pytest.mark.parametrize("saver", ["safetensors", "diffusers"])
def test_the_norms_of_a_file_are_those_the_run_that_made_it_reported(model: str, tmp_path: Path, saver: str) -> None:
    file = tmp_path / "owl.safetensors"
    result = lora_forge.run("an owl", model, iterations=2, alpha=6, saver=saver, output=file)
    norms: dict[str | None, list[float]] = {}
    for report in report_layers(open_lora(file)):
        norms.setdefault(report.component, []).append(report.delta_norm or 0.0)
    effect = {one.component: one.delta_norm for one in result.effect.components}
    assert {component: math.hypot(*values) for component, values in norms.items()} == pytest.approx(effect, rel=1e-5)


def test_alpha_is_asked_of_one_layer_without_reading_its_matrices(tmp_path: Path) -> None:
    lora = open_lora(saved(tmp_path / "a.safetensors", pair(Q_PROJ, 4, 5, alpha=2.5)))
    assert layer_alpha(lora, lora.layers[0]) == 2.5
