"""The encoders' attention on a CPU in 16 bits: transformers' own numbers, and gradients that have gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from lora_forge.clip_unet.attention import use_short_attention

IDS = torch.tensor([[1, 5, 7, 2, 0, 0], [1, 9, 2, 0, 0, 0], [1, 3, 3, 3, 3, 2]])
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
Pair = tuple[Any, Any]


def encoders(dtype: torch.dtype) -> Pair:
    """The same encoder twice: with transformers' eager attention in float64, and with ours in `dtype`."""
    config = CLIPTextConfig(
        vocab_size=12,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=8,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    ours = CLIPTextModel(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    plain = CLIPTextModel(config).double().eval()
    plain.load_state_dict(ours.state_dict())
    use_short_attention(ours)
    return plain, ours


def states(encoder: Any, mask: torch.Tensor | None) -> torch.Tensor:
    result: torch.Tensor = encoder(input_ids=IDS, attention_mask=mask).last_hidden_state
    return result


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found.double() - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=str)
@pytest.mark.parametrize("mask", [None, MASK], ids=["causal", "causal and padded"])
def test_states_and_gradients_are_those_of_eager_attention_in_float64(
    dtype: torch.dtype, tolerance: float, mask: torch.Tensor | None
) -> None:
    plain, ours = encoders(dtype)
    expected, found = states(plain, mask), states(ours, mask)
    assert found.dtype is dtype
    assert difference(found, expected) <= tolerance
    weights = torch.randn(expected.shape)
    (found * weights).sum().backward()  # type: ignore[no-untyped-call]
    (expected * weights).sum().backward()  # type: ignore[no-untyped-call]
    theirs = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        if not name.endswith("k_proj.bias"):  # a number added to all scores of a row changes nothing
            assert difference(parameter.grad, theirs[name].grad) <= 2 * tolerance, name


def test_sixteen_bit_states_are_as_close_to_float64_as_those_of_eager_attention() -> None:
    plain, ours = encoders(torch.bfloat16)
    expected = states(plain, MASK)
    mine = difference(states(ours, MASK), expected)
    ours.set_attn_implementation("eager")
    assert mine <= 1.2 * difference(states(ours, MASK), expected)


def test_sixteen_bit_gradients_are_as_close_to_float64_as_those_of_eager_attention() -> None:
    plain, ours = encoders(torch.bfloat16)
    weights = torch.randn(3, 6, 32)

    def gradients(encoder: Any) -> torch.Tensor:
        encoder.zero_grad()
        (states(encoder, MASK) * weights).sum().backward()  # type: ignore[no-untyped-call]
        return torch.cat([p.grad.flatten() for name, p in encoder.named_parameters() if "k_proj.bias" not in name])

    expected = gradients(plain)
    mine = difference(gradients(ours), expected)
    ours.set_attn_implementation("eager")
    assert mine <= 1.2 * difference(gradients(ours), expected)


def test_the_gradient_can_be_differentiated_in_turn() -> None:
    slopes = []
    for encoder in encoders(torch.float64):
        parameters = [p for name, p in encoder.named_parameters() if name.endswith(("q_proj.weight", "v_proj.weight"))]
        gradients = torch.autograd.grad(states(encoder, MASK).pow(3).sum(), parameters, create_graph=True)
        length = torch.cat([gradient.flatten() for gradient in gradients]).square().sum()
        slopes.append(torch.cat([slope.flatten() for slope in torch.autograd.grad(length, parameters)]))
    assert difference(slopes[1], slopes[0]) <= 1e-9


def test_a_texts_states_are_up_to_rounding_the_same_whatever_is_beside_it() -> None:
    _, ours = encoders(torch.float32)
    alone = [ours(input_ids=IDS[i : i + 1], attention_mask=MASK[i : i + 1]).last_hidden_state for i in range(3)]
    assert difference(torch.cat(alone), states(ours, MASK).double()) <= 1e-6
