"""Frozen linear layers: whatever route a product takes, its result and its gradients are the plain ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from lora_forge import frozen
from lora_forge.frozen import MANY_ROWS, FrozenLinear, freeze

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(autouse=True)
def small_weights_go_the_large_ones_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "LARGE_WEIGHT", 0)


@pytest.fixture(params=["this", "no 16-bit arithmetic", "slow at few rows"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """This machine's, or one of another kind."""
    if request.param == "no 16-bit arithmetic":
        monkeypatch.setattr(frozen, "has_arithmetic", lambda dtype: dtype is torch.float32)
    if request.param == "slow at few rows":
        monkeypatch.setattr(frozen, "_narrow_is_slow", lambda: True)
    return str(request.param)


def layer(inputs: int, outputs: int, dtype: torch.dtype, *, bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    """A frozen linear layer, and a plain one of the same numbers in float64."""
    torch.manual_seed(inputs + outputs)
    made = nn.Linear(inputs, outputs, bias=bias).to(dtype)
    plain = nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64)
    plain.load_state_dict(made.state_dict())
    return freeze(nn.Sequential(made))[0], plain  # type: ignore[index]


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 77), (5, 2, 7), (1, 80), (MANY_ROWS + 1,)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_result_and_gradient_are_those_of_a_plain_linear_layer(
    processor: str, dtype: torch.dtype, shape: tuple[int, ...], bias: bool
) -> None:
    made, plain = layer(24, 40, dtype, bias=bias)
    rows = torch.randn(*shape, 24, dtype=dtype, requires_grad=True)
    other = rows.detach().double().requires_grad_()
    found, expected = made(rows), plain(other)
    assert found.dtype is dtype
    assert found.shape == expected.shape
    assert difference(found.detach(), expected.detach()) <= TOLERANCE[dtype]
    weights = torch.randn(expected.shape)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert rows.grad is not None
    assert other.grad is not None
    assert rows.grad.dtype is dtype
    assert difference(rows.grad, other.grad) <= TOLERANCE[dtype]


def test_the_gradient_can_be_differentiated_in_turn() -> None:
    made, plain = layer(6, 5, torch.float32)
    rows = torch.randn(4, 6, requires_grad=True)
    doubled = rows.detach().double().requires_grad_()
    found = []
    for one, linear in ((rows, made), (doubled, plain)):
        (slope,) = torch.autograd.grad(linear(one).pow(3).sum(), one, create_graph=True)
        slope.square().sum().backward()  # type: ignore[no-untyped-call]
        found.append(one.grad)
    assert difference(*found) <= 1e-5  # type: ignore[arg-type]


def test_rows_come_out_the_same_every_time_and_up_to_rounding_whoever_is_beside_them(processor: str) -> None:
    made, _ = layer(64, 48, torch.float32)
    rows = torch.randn(16, 77, 64)
    together = made(rows)
    assert torch.equal(together, made(rows))
    for row in range(len(rows)):
        torch.testing.assert_close(together[row], made(rows[row]), rtol=1e-5, atol=1e-5)


def test_widened_weights_of_one_layer_are_not_those_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "has_arithmetic", lambda dtype: dtype is torch.float32)
    layers = [layer(24, outputs, torch.bfloat16)[0] for outputs in (40, 8, 56)]
    rows = torch.randn(3, 24).bfloat16().requires_grad_()
    found = [one(rows) for one in layers]
    for one, result in zip(layers, found, strict=True):
        expected = functional.linear(rows.float(), one.weight.float(), one.bias.float()).bfloat16()
        torch.testing.assert_close(result, expected)
    sum(result.float().sum() for result in found).backward()
    expected_gradient = sum(one.weight.float().sum(dim=0) for one in layers)
    torch.testing.assert_close(rows.grad, expected_gradient.expand(3, -1).bfloat16(), rtol=2e-2, atol=2e-2)  # type: ignore[union-attr]


def test_freezing_keeps_each_parameter_itself_and_leaves_other_kinds_of_layers_alone() -> None:
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict({"plain": nn.Linear(3, 2), "own": Own(3, 2), "norm": nn.LayerNorm(2)})
    before = dict(model.named_parameters())
    freeze(model)
    assert {name: type(module) for name, module in model.items()} == {
        "plain": FrozenLinear,
        "own": Own,
        "norm": nn.LayerNorm,
    }
    after = dict(model.named_parameters())
    assert all(after[name] is parameter and not parameter.requires_grad for name, parameter in before.items())
    assert model.state_dict().keys() == before.keys()


def test_a_weight_gets_no_gradient_and_an_input_of_another_dtype_is_refused_as_ever() -> None:
    made, _ = layer(3, 2, torch.float32)
    made.weight.requires_grad_()
    made(torch.randn(4, 3, requires_grad=True)).sum().backward()
    assert made.weight.grad is None
    with pytest.raises(RuntimeError, match="dtype"):
        made(torch.randn(4, 3, dtype=torch.float64))
