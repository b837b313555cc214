"""The specification computed again, independently and naively: the whole pipeline, PEFT, and a plain loop.

Nothing of lora_forge is imported here. Initial weights come from outside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model

ENCODERS = ("text_encoder", "text_encoder_2")
Weights = dict[str, dict[str, dict[str, torch.Tensor]]]


@dataclass
class Outcome:
    """Losses before each update, and the weights at the end, by canonical name."""

    losses: list[float]
    weights: Weights


def canonical(component: str, name: str) -> str:
    if component == "text_encoder" and not name.startswith("text_model."):
        return f"text_model.{name}"
    return name


def forge(
    folder: Path,
    prompt: str,
    initial: Weights,
    *,
    rank: int,
    alpha: float,
    iterations: int,
    l2: float = 1e-5,
    lr: float = 1e-4,
    fused: bool = False,
    size: Callable[[torch.Tensor], torch.Tensor] = torch.abs,
) -> Outcome:
    pipe: Any = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    present = [name for name in ENCODERS if hasattr(pipe, name)]
    for component in ("unet", *present, "vae"):
        getattr(pipe, component).requires_grad_(False)
    adapted: dict[str, Any] = {}
    layers: dict[str, dict[str, Any]] = {}
    for component, targets in initial.items():
        model = getattr(pipe, component)
        actual = {canonical(component, name): name for name, _ in model.named_modules()}
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=[actual[name] for name in targets])
        adapted[component] = get_peft_model(model, config)
        layers[component] = {name: model.get_submodule(actual[name]) for name in targets}
        for name, pair in targets.items():
            layers[component][name].lora_A["default"].weight.data.copy_(pair["lora_A"])
            layers[component][name].lora_B["default"].weight.data.copy_(pair["lora_B"])
    parameters = [p for model in adapted.values() for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, fused=fused)
    encoders = [name for name in present if name in adapted]
    tokens = {}
    for name in encoders:
        tokenizer = getattr(pipe, name.replace("text_encoder", "tokenizer"))
        tokens[name] = tokenizer(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    losses = []
    for _ in range(iterations):
        optimizer.zero_grad()
        terms = []
        for name in encoders:
            output = adapted[name](input_ids=tokens[name].input_ids, attention_mask=tokens[name].attention_mask)
            terms.append(-torch.mean(size(output.last_hidden_state)))
        embedding_loss = sum(terms, torch.zeros(())) / len(terms)
        regularization = sum((l2 * torch.sum(p**2) for p in parameters), torch.zeros(()))
        total = embedding_loss + regularization
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(total.detach()))
    weights = {
        component: {
            name: {
                "lora_A": layer.lora_A["default"].weight.detach().clone(),
                "lora_B": layer.lora_B["default"].weight.detach().clone(),
            }
            for name, layer in found.items()
        }
        for component, found in layers.items()
    }
    return Outcome(losses, weights)
