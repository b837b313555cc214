"""Built-in savers: the layout every consumer loads whole, and diffusers' own spelling."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_forge import SaverSpec, hookimpl
from lora_forge.contracts import LoraWeights, SaveReport, SaveRequest
from lora_forge.errors import LoraForgeError
from lora_forge.files.canonical import write_safetensors
from lora_forge.files.names import diffusers_name, file_stem, missing_siblings, universal_name

if TYPE_CHECKING:
    import torch


def universal(request: SaveRequest) -> SaveReport:
    """kohya's keys, and alpha for every layer. Raises LoraForgeError for a family that has no such layout."""
    import torch

    layout = request.layout
    if layout is None:
        family = repr(request.family)
        raise LoraForgeError(
            f"the universal layout has no names for the family {family}; choose another saver, such as 'diffusers'"
        )
    weights, padded = _padded(request.weights)
    tensors: dict[str, torch.Tensor] = {}
    for component, layers in weights.items():
        for layer, pair in layers.items():
            name = universal_name(layout, component, layer)
            tensors[f"{name}.lora_down.weight"] = pair["lora_A"]
            tensors[f"{name}.lora_up.weight"] = pair["lora_B"]
            tensors[f"{name}.alpha"] = torch.tensor(request.alpha, dtype=torch.float32)
    write_safetensors(request.path, tensors, _metadata(request))
    return SaveReport(padded)


def diffusers(request: SaveRequest) -> SaveReport:
    """PEFT's spelling under component names, alpha / rank folded into B: every reader takes alpha = rank then."""
    weights, padded = _padded(request.weights)
    scale = request.alpha / request.rank
    tensors: dict[str, torch.Tensor] = {}
    for component, layers in weights.items():
        for layer, pair in layers.items():
            name = diffusers_name(component, layer)
            tensors[f"{name}.lora_A.weight"] = pair["lora_A"]
            tensors[f"{name}.lora_B.weight"] = pair["lora_B"] * scale
    write_safetensors(request.path, tensors, _metadata(request))
    return SaveReport(padded)


def _padded(weights: LoraWeights) -> tuple[LoraWeights, tuple[str, ...]]:
    """The weights with zero layers where readers demand an encoder's whole attention, and their names."""
    import torch

    result = {component: dict(layers) for component, layers in weights.items()}
    padded = []
    for component, layers in weights.items():
        for layer, sibling in missing_siblings(list(layers)).items():
            result[component][layer] = {name: torch.zeros_like(value) for name, value in layers[sibling].items()}
            padded.append(f"{component}.{layer}")
    return result, tuple(padded)


def _metadata(request: SaveRequest) -> dict[str, str]:
    """What user interfaces file a LoRA by, beside what the run itself records."""
    return {
        "modelspec.sai_model_spec": "1.0.1",
        # Named for the prompt, not the file: the same run gives the same bytes wherever it is written.
        "modelspec.title": request.prompt,
        "modelspec.trigger_phrase": request.prompt,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(request.rank),
        "ss_network_alpha": f"{request.alpha:g}",
        "ss_network_args": "{}",
        "ss_output_name": file_stem(request.prompt),
        "ss_tag_frequency": json.dumps({"prompt": {request.prompt: 1}}, ensure_ascii=False),
        **request.metadata,
    }


@hookimpl
def lora_forge_savers() -> Iterator[SaverSpec]:
    yield SaverSpec(
        name="safetensors",
        summary="the layout that diffusers, ComfyUI, Forge, A1111, InvokeAI and sd-scripts all load whole",
        factory=universal,
        needs_layout=True,
    )
    yield SaverSpec(
        name="diffusers",
        summary="diffusers' and PEFT's own spelling, alpha folded in",
        factory=diffusers,
    )
