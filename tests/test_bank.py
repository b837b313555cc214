"""The bank: LoRA layers with a leading prompts dimension, against PEFT's own layer and naive arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_forge import bank as bank_module
from lora_forge.bank import Bank, BankLinear, BankSlot, inject
from lora_forge.contracts import LoraWeights, TargetLayer
from lora_forge.errors import ModelError

RANK, ALPHA, PROMPTS = 3, 5.0, 4


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 11)
        self.second = nn.Linear(11, 5, bias=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.second(torch.tanh(self.first(rows)))
        return hidden


LAYERS = [TargetLayer("part", "first", 11, 7), TargetLayer("part", "second", 5, 11)]
NAMES = {layer.name: layer.key for layer in LAYERS}


def random_weights(prompts: int, seed: int = 0) -> LoraWeights:
    generator = torch.Generator().manual_seed(seed)
    return {
        "part": {
            layer.name: {
                "lora_A": torch.randn(prompts, RANK, layer.in_features, generator=generator),
                "lora_B": torch.randn(prompts, layer.out_features, RANK, generator=generator),
            }
            for layer in LAYERS
        }
    }


def adapted_model(bank: Bank) -> tuple[TwoLayers, BankSlot]:
    torch.manual_seed(1)
    model, slot = TwoLayers().requires_grad_(False), BankSlot()
    inject(model, NAMES, RANK, ALPHA, slot)
    slot.bank = bank
    return model, slot


def peft_model(weights: LoraWeights, prompt: int) -> TwoLayers:
    torch.manual_seed(1)
    model = TwoLayers()
    get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(NAMES)))
    for name, pair in weights["part"].items():
        layer: Any = model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(pair["lora_A"][prompt])
        layer.lora_B["default"].weight.data.copy_(pair["lora_B"][prompt])
    return model


def filled_bank(prompts: int = PROMPTS) -> Bank:
    bank = Bank(LAYERS, rank=RANK, alpha=ALPHA, prompts=prompts)
    bank.fill(random_weights(prompts))
    return bank


def test_each_prompt_of_a_bank_is_what_pefts_own_layer_computes_with_its_weights_and_so_are_its_gradients() -> None:
    weights, bank = random_weights(PROMPTS), filled_bank()
    model, _ = adapted_model(bank)
    rows = torch.randn(PROMPTS, 6, 7)
    output = model(rows)
    output.square().mean(dim=(1, 2)).sum().backward()
    for prompt in range(PROMPTS):
        oracle = peft_model(weights, prompt)
        expected = oracle(rows[prompt])
        torch.testing.assert_close(output[prompt], expected, rtol=1e-5, atol=1e-5)
        expected.square().mean().backward()
        for layer in LAYERS:
            theirs: Any = oracle.get_submodule(layer.name)
            ours: Any = bank.pairs[layer.key]
            torch.testing.assert_close(ours.lora_A.grad[prompt], theirs.lora_A["default"].weight.grad)
            torch.testing.assert_close(ours.lora_B.grad[prompt], theirs.lora_B["default"].weight.grad)


def test_several_rows_of_one_prompt_share_its_weights() -> None:
    bank = filled_bank()
    model, _ = adapted_model(bank)
    rows = torch.randn(PROMPTS * 2, 6, 7)
    output = model(rows)
    for row in range(PROMPTS * 2):
        expected = peft_model(random_weights(PROMPTS), row // 2)(rows[row])
        torch.testing.assert_close(output[row], expected, rtol=1e-5, atol=1e-5)


def test_a_frozen_slot_and_an_empty_slot_give_the_frozen_model_to_the_bit() -> None:
    bank = filled_bank(1)
    model, slot = adapted_model(bank)
    torch.manual_seed(1)
    original, rows = TwoLayers(), torch.randn(1, 6, 7)
    with slot.frozen():
        assert torch.equal(model(rows), original(rows))
    assert not torch.equal(model(rows), original(rows))
    slot.bank = None
    assert torch.equal(model(rows), original(rows))


def test_unloading_puts_the_original_layers_back() -> None:
    model = TwoLayers()
    before = dict(model.named_modules())
    inject(model, NAMES, RANK, ALPHA, BankSlot()).unload()
    assert dict(model.named_modules()) == before


def test_all_matrices_and_their_gradients_are_views_of_one_buffer_each_even_after_a_backward_pass() -> None:
    bank = filled_bank()
    model, _ = adapted_model(bank)
    model(torch.randn(PROMPTS, 6, 7)).sum().backward()
    assert bank.parameter.numel() == PROMPTS * sum(RANK * (layer.in_features + layer.out_features) for layer in LAYERS)
    pairs: list[Any] = [tensor for pair in bank.pairs.values() for tensor in pair]
    values = torch.cat([tensor.detach().reshape(PROMPTS, -1) for tensor in pairs], dim=1)
    gradients = torch.cat([tensor.grad.reshape(PROMPTS, -1) for tensor in pairs], dim=1)
    assert torch.equal(values, bank.parameter.detach())
    assert torch.equal(gradients, bank.gradient)
    assert gradients.abs().sum() > 0
    with torch.no_grad():
        bank.parameter.zero_()
    assert all(not tensor.any() for tensor in pairs)


def test_l2_and_its_gradient_are_those_of_autograd_per_prompt() -> None:
    bank, strength = filled_bank(), 1e-2
    leaf: Any = bank.parameter.detach().clone().requires_grad_()
    expected = strength * (leaf**2).sum(dim=1)
    expected.sum().backward()
    values = bank.add_l2(strength)
    torch.testing.assert_close(values, expected.detach())
    torch.testing.assert_close(bank.gradient, leaf.grad)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**20), prompts=st.integers(1, 4))
def test_delta_norms_are_the_norms_of_the_products_written_out(seed: int, prompts: int) -> None:
    weights = random_weights(prompts, seed)
    bank = Bank(LAYERS, rank=RANK, alpha=ALPHA, prompts=prompts)
    bank.fill(weights)
    for layer in LAYERS:
        pair = weights["part"][layer.name]
        expected = (ALPHA / RANK * pair["lora_B"].double() @ pair["lora_A"].double()).flatten(1).norm(dim=1)
        torch.testing.assert_close(bank.delta_norms()[layer.key], expected)


def test_scaling_the_result_scales_each_prompts_delta_by_its_own_factor() -> None:
    bank, factors = filled_bank(), torch.tensor([0.0, 1.0, -2.0, 0.5])
    before = bank.delta_norms()
    bank.scale_result(factors)
    for key, after in bank.delta_norms().items():
        torch.testing.assert_close(after, before[key] * factors.abs().double())


def test_one_prompts_rows_step_the_bank_itself() -> None:
    bank = filled_bank()
    bank.gradient.normal_()
    before = bank.parameter.detach().clone()
    optimizer = torch.optim.SGD(bank.rows(2), lr=0.5)
    optimizer.step()
    expected = before.clone()
    expected[2] -= 0.5 * bank.gradient[2]
    torch.testing.assert_close(bank.parameter.detach(), expected)


def test_weights_come_out_as_they_went_in() -> None:
    weights, bank = random_weights(PROMPTS), filled_bank()
    for prompt in range(PROMPTS):
        for name, pair in bank.weights(prompt)["part"].items():
            for matrix, value in pair.items():
                assert torch.equal(value, weights["part"][name][matrix][prompt])


@pytest.mark.parametrize("harm", ["missing", "shape", "nan"])
def test_initial_weights_that_do_not_fit_are_named(harm: str) -> None:
    weights = random_weights(PROMPTS)
    if harm == "missing":
        del weights["part"]["second"]
    elif harm == "shape":
        weights["part"]["second"]["lora_A"] = torch.zeros(PROMPTS, RANK, 12)
    else:
        weights["part"]["second"]["lora_A"][0, 0, 0] = float("nan")
    with pytest.raises(ModelError, match="not finite" if harm == "nan" else r"part\.second"):
        Bank(LAYERS, rank=RANK, alpha=ALPHA, prompts=PROMPTS).fill(weights)


def test_a_layer_that_is_not_plainly_linear_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 7), nn.Linear(7, 3))
    with pytest.raises(ModelError, match="not a plain linear layer"):
        inject(model, {"0": ("part", "0")}, RANK, ALPHA, BankSlot())


def test_a_bank_layer_keeps_the_dtype_of_the_frozen_layer() -> None:
    layer = BankLinear(nn.Linear(7, 11).to(torch.bfloat16).requires_grad_(False), "default")
    bank = Bank([TargetLayer("", "", 11, 7)], rank=RANK, alpha=ALPHA, prompts=2)
    layer.slot.bank = bank
    assert layer(torch.randn(2, 6, 7, dtype=torch.bfloat16)).dtype is torch.bfloat16
    assert bank.parameter.dtype is torch.float32


@pytest.mark.parametrize("native", [True, False])
def test_in_16_bits_the_low_rank_term_and_its_gradients_are_those_of_float32_to_the_rounding(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bank_module, "has_arithmetic", lambda dtype: native)
    torch.manual_seed(0)
    made = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(1)
        bank = Bank([TargetLayer("c", "layer", 32, 48)], rank=4, alpha=8.0, prompts=3)
        bank.parameter.data.normal_(std=0.3)
        layer = BankLinear(nn.Linear(48, 32).to(dtype).requires_grad_(False), "default")
        layer.slot.bank, layer.key = bank, ("c", "layer")
        hidden = torch.randn(6, 5, 48).to(dtype).requires_grad_()
        result = layer(hidden)
        assert result.dtype is dtype
        result.float().square().sum().backward()
        assert hidden.grad is not None
        made[dtype] = [result.float(), hidden.grad.float(), bank.gradient.clone()]
    for exact, rounded in zip(made[torch.float32], made[torch.bfloat16], strict=True):
        assert float((exact - rounded).norm()) <= 0.01 * float(exact.norm())


def test_what_a_hook_has_kept_of_a_frozen_layers_own_input_is_not_changed_by_the_low_rank_term() -> None:
    bank = Bank([TargetLayer("c", "layer", 8, 8)], rank=2, alpha=2.0, prompts=1)
    bank.parameter.data.normal_()
    base = nn.Linear(8, 8).requires_grad_(False)
    layer = BankLinear(base, "default")
    layer.slot.bank, layer.key = bank, ("c", "layer")
    hidden = torch.randn(1, 3, 8)
    before = hidden.clone()
    first, second = layer(hidden), layer(hidden)
    assert torch.equal(hidden, before)
    assert torch.equal(first, second)
    assert not torch.allclose(first, base(hidden))


def test_a_bank_at_rest_has_the_same_numbers_in_one_place_and_no_gradient() -> None:
    bank = filled_bank()
    before, norms = [bank.weights(prompt) for prompt in range(PROMPTS)], bank.delta_norms()
    bank.rest()
    for prompt, weights in enumerate(before):
        for layer, pair in weights["part"].items():
            for name, expected in pair.items():
                assert torch.equal(bank.weights(prompt)["part"][layer][name], expected)
    assert all(torch.equal(norm, norms[key]) for key, norm in bank.delta_norms().items())
    assert bank.parameter.grad is None
    assert bank.gradient.numel() == 0
    bank.parameter.zero_()
    assert not any(part.any() for pair in bank.pairs.values() for part in pair)
    assert not any(part.requires_grad or part.grad is not None for pair in bank.pairs.values() for part in pair)
