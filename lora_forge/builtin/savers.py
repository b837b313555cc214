"""Built-in savers: the layout every consumer loads whole, diffusers' own spelling, and PEFT's folders."""

from __future__ import annotations

import json
from collections.abc import Iterator

from lora_forge import SaverSpec, hookimpl
from lora_forge.contracts import SaveReport, SaveRequest
from lora_forge.errors import LoraForgeError
from lora_forge.files.formats import lay_out, write_format
from lora_forge.files.layer_tensors import layers_of
from lora_forge.files.names import file_stem


def universal(request: SaveRequest) -> SaveReport:
    """kohya's keys, and alpha for every layer. Raises LoraForgeError for a family that has no such layout."""
    if request.layout is None:
        family = repr(request.family)
        raise LoraForgeError(
            f"the universal layout has no names for the family {family}; choose another saver, such as 'diffusers'"
        )
    return _save(request, "safetensors")


def diffusers(request: SaveRequest) -> SaveReport:
    """PEFT's spelling under component names, alpha / rank folded into B: every reader takes alpha = rank then."""
    return _save(request, "diffusers")


def peft(request: SaveRequest) -> SaveReport:
    """A folder for each component, with PEFT's adapter_config.json, which holds the true alpha."""
    return _save(request, "peft")


def _save(request: SaveRequest, format: str) -> SaveReport:
    layers = layers_of(request.weights, request.alpha)
    laid = lay_out(layers, format)
    write_format(request.path, format, laid.layers, request.layout, _metadata(request))
    half = any(one.up.dtype.itemsize < 4 for one in layers.values())
    return SaveReport(laid.padded, laid.notes if half else ())  # in float32 nobody would notice


def _metadata(request: SaveRequest) -> dict[str, str]:
    """What user interfaces file a LoRA by, beside what the run itself records."""
    return {
        "modelspec.sai_model_spec": "1.0.1",
        # Named for the prompt, not the file: the same run gives the same bytes wherever it is written.
        "modelspec.title": request.prompt,
        "modelspec.trigger_phrase": request.prompt,
        "modelspec.description": f"made from its prompt alone, without images: {request.prompt}",
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
    yield SaverSpec(
        name="peft",
        summary="a folder per component, for PeftModel.from_pretrained",
        factory=peft,
        suffix="",
        folder=True,
    )
