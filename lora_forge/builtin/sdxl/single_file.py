"""Where the text encoders' parameters lie in a single-file SDXL checkpoint.

Encoder 1 is there under its canonical names. Encoder 2 is there as OpenCLIP has it: q, k and v in one
tensor, and the projection transposed. Source of the names: Stability AI generative-models and OpenCLIP.
"""

from __future__ import annotations

import re

from lora_forge.clip_unet.family import Take, whole
from lora_forge.errors import ModelError

_FIRST = "conditioner.embedders.0.transformer."
_SECOND = "conditioner.embedders.1.model."
_OUTSIDE = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
_INSIDE = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)\Z")
_THIRDS = {"self_attn.q_proj": 0, "self_attn.k_proj": 1, "self_attn.v_proj": 2}


def single_file_location(component: str, canonical: str) -> tuple[str, Take]:
    """The key of an encoder's parameter, and how to take it from the tensor there.

    Raises ModelError for a parameter such a checkpoint does not have.
    """
    if component == "text_encoder":
        return _FIRST + canonical, whole
    if canonical == "text_projection.weight":
        return _SECOND + "text_projection", lambda tensor: tensor.T.contiguous()
    if canonical in _OUTSIDE:
        return _SECOND + _OUTSIDE[canonical], whole
    match = _LAYER.match(canonical)
    if match:
        number, module, kind = match.groups()
        block = f"{_SECOND}transformer.resblocks.{number}."
        if module in _INSIDE:
            return f"{block}{_INSIDE[module]}.{kind}", whole
        if module in _THIRDS:
            return f"{block}attn.in_proj_{kind}", _third(_THIRDS[module])
    raise ModelError(f"a single-file SDXL checkpoint has no {component}.{canonical}")


def _third(index: int) -> Take:
    return lambda tensor: tensor.chunk(3, dim=0)[index]
