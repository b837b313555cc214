"""A run computes what the specification says: held to an independent, naive computation of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import specification
import torch
from tiny_models import target_layers

import lora_forge

PROMPTS = (
    "a vibrant oil painting of a steampunk owl",
    "bond",
    "a city intersection without cars",
)
# mean|h| has kinks: where an element crosses zero a step earlier in one of two correct float32 computations,
# a tensor can differ by more than rounding. These three prompts have no such element within 20 steps.


def relative_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative norm of the difference; zero equals zero."""
    difference = float((one - other).norm())
    return difference / float(other.norm()) if difference else 0.0


@pytest.mark.parametrize(
    ("prompt", "alpha"), [(PROMPTS[0], 4.0), (PROMPTS[0], 10.0), (PROMPTS[1], 4.0), (PROMPTS[2], 10.0)]
)
def test_every_tensor_and_every_loss_of_20_steps_equals_the_naive_computation(
    model: str, model_folder: Path, prompt: str, alpha: float
) -> None:
    start = lora_forge.run(prompt, model, iterations=0, alpha=alpha)
    ours = lora_forge.run(prompt, model, iterations=20, alpha=alpha)
    naive = specification.forge(model_folder, prompt, start.weights, rank=4, alpha=alpha, iterations=20)

    assert [step.loss for step in ours.steps] == pytest.approx(naive.losses, rel=1e-5)
    assert ours.weights.keys() == naive.weights.keys()
    for component, layers in naive.weights.items():
        assert ours.weights[component].keys() == layers.keys()
        for layer, pair in layers.items():
            for name, expected in pair.items():
                assert relative_difference(ours.weights[component][layer][name], expected) <= 1e-5, (layer, name)


def test_layers_of_a_component_that_is_not_loaded_come_out_bit_for_bit_as_if_it_had_been(
    model: str, model_folder: Path
) -> None:
    prompt = PROMPTS[0]
    start = lora_forge.run(prompt, model, iterations=0)
    ours = lora_forge.run(prompt, model, iterations=20)
    naive = specification.forge(model_folder, prompt, start.weights, rank=4, alpha=4, iterations=20, fused=True)

    assert ours.weights["unet"].keys() == target_layers(model)["unet"].keys()
    for layer, pair in naive.weights["unet"].items():
        assert torch.equal(ours.weights["unet"][layer]["lora_A"], pair["lora_A"])
        assert torch.equal(ours.weights["unet"][layer]["lora_B"], torch.zeros_like(pair["lora_B"]))
        assert not torch.equal(pair["lora_A"], start.weights["unet"][layer]["lora_A"])


def test_initial_weights_are_the_seeded_gaussian_of_each_layer_alone(model: str) -> None:
    result = lora_forge.run("anything", model, iterations=0, seed=7)
    for component, layers in result.weights.items():
        for layer, pair in layers.items():
            digest = hashlib.sha256(f"7/{component}/{layer}".encode()).digest()
            generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big"))
            expected = torch.randn(pair["lora_A"].shape, generator=generator) * 0.01
            assert torch.equal(pair["lora_A"], expected)
            assert torch.equal(pair["lora_B"], torch.zeros(pair["lora_B"].shape))
