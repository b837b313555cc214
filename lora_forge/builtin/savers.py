"""Built-in savers: the layout every consumer loads whole, and diffusers' own spelling."""

from __future__ import annotations

import json
from collections.abc import Iterator

from lora_forge import SaverSpec, hookimpl
from lora_forge.contracts import SaveReport, SaveRequest
from lora_forge.errors import LoraForgeError
from lora_forge.files.canonical import write_safetensors
from lora_forge.files.formats import diffusers_tensors, universal_tensors, with_siblings
from lora_forge.files.layer_tensors import Layers, LayerTensors
from lora_forge.files.names import file_stem


def universal(request: SaveRequest) -> SaveReport:
    """kohya's keys, and alpha for every layer. Raises LoraForgeError for a family that has no such layout."""
    layout = request.layout
    if layout is None:
        family = repr(request.family)
        raise LoraForgeError(
            f"the universal layout has no names for the family {family}; choose another saver, such as 'diffusers'"
        )
    layers, padded = with_siblings(_layers(request, request.alpha))
    write_safetensors(request.path, universal_tensors(layers, layout), _metadata(request))
    return SaveReport(padded)


def diffusers(request: SaveRequest) -> SaveReport:
    """PEFT's spelling under component names, alpha / rank folded into B: every reader takes alpha = rank then."""
    layers, padded = with_siblings(_layers(request, request.rank, request.alpha / request.rank))
    write_safetensors(request.path, diffusers_tensors(layers), _metadata(request))
    return SaveReport(padded)


def _layers(request: SaveRequest, alpha: float, scale: float = 1.0) -> Layers:
    """The request's layers under another alpha, their B times `scale`."""
    return {
        (component, layer): LayerTensors(pair["lora_A"], pair["lora_B"] * scale, alpha)
        for component, layers in request.weights.items()
        for layer, pair in layers.items()
    }


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
