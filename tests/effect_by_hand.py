"""What a LoRA does to the conditioning, by hand: a pipeline of diffusers, with ΔW added to its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_models import layout_of

import lora_forge
from lora_forge.clip_unet.encoders import canonical_name
from lora_forge.files.names import universal_name

Deltas = dict[tuple[str, str], torch.Tensor]


def encoder_layers(pipe: Any) -> Iterator[tuple[str, str, torch.nn.Linear]]:
    for component in ("text_encoder", "text_encoder_2"):
        for path, module in getattr(pipe, component, torch.nn.Module()).named_modules():
            if isinstance(module, torch.nn.Linear) and ".layers." in path:
                yield component, canonical_name(component, path), module


def conditioning(pipe: Any, prompt: str) -> dict[str, torch.Tensor]:
    """What the pipeline conditions its UNet on, by part."""
    with torch.no_grad():
        encoded = pipe.encode_prompt(
            prompt=prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    if not hasattr(pipe, "text_encoder_2"):
        return {"text_encoder last": encoded[0].double()}
    states, _, pooled, _ = encoded
    width = pipe.text_encoder.config.hidden_size
    return {
        "text_encoder penultimate": states[..., :width].double(),
        "text_encoder_2 penultimate": states[..., width:].double(),
        "text_encoder_2 pooled": pooled.double(),
    }


@contextmanager
def added(pipe: Any, deltas: Mapping[tuple[str, str], torch.Tensor]) -> Iterator[None]:
    """Within this the encoders' weights are W + ΔW."""
    modules = {(component, layer): module for component, layer, module in encoder_layers(pipe)}
    before = {key: modules[key].weight.detach().clone() for key in deltas}
    with torch.no_grad():
        for key, delta in deltas.items():
            modules[key].weight += delta
        yield
        for key, weight in before.items():
            modules[key].weight.copy_(weight)


def shift_by_hand(pipe: Any, prompt: str, deltas: Mapping[tuple[str, str], torch.Tensor]) -> dict[str, float]:
    """The relative shift of all of the conditioning, then of each part."""
    before = conditioning(pipe, prompt)
    with added(pipe, deltas):
        after = conditioning(pipe, prompt)
    all_before, all_after = (torch.cat([part.flatten() for part in parts.values()]) for parts in (before, after))
    parts = {name: float((after[name] - part).norm() / part.norm()) for name, part in before.items()}
    return {"conditioning": float((all_after - all_before).norm() / all_before.norm()), **parts}


def deltas_of(result: lora_forge.RunResult) -> Deltas:
    return {
        (component, layer): result.alpha / result.rank * pair["lora_B"] @ pair["lora_A"]
        for component, layers in result.weights.items()
        if component != "unet"
        for layer, pair in layers.items()
    }


def write_uneven(pipe: Any, family: str, path: Path) -> Deltas:
    """Write a file in which each layer of the encoders has a rank and an alpha of its own; its ΔW."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    deltas: Deltas = {}
    for number, (component, layer, module) in enumerate(encoder_layers(pipe)):
        rank, alpha = 1 + number % 5, (0.5, 3.0, 8.0)[number % 3]
        down = torch.randn(rank, module.in_features, generator=generator)
        up = torch.randn(module.out_features, rank, generator=generator) * 0.02
        name = universal_name(layout_of(family), component, layer)
        tensors |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(alpha),
        }
        deltas[component, layer] = alpha / rank * up @ down
    save_file(tensors, path)
    return deltas


def shifts(prompt: Mapping[str, Any]) -> dict[str, float]:
    return {shift["name"]: shift["relative"] for shift in prompt["shifts"]}


def of_role(answer: Mapping[str, Any], role: str) -> list[Any]:
    return [one for one in answer["prompts"] if one["role"] == role]
