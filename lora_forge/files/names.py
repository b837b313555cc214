"""What a target layer is called in a LoRA file: the universal layout, and diffusers' spelling.

Universal is the one layout of a family that diffusers, ComfyUI, Forge, A1111, InvokeAI and sd-scripts all read
whole: a prefix for each component (`lora_unet`, `lora_te1`, …), the layer's name with `_` for `.`,
`.lora_down.weight`, `.lora_up.weight`, and `.alpha` for every layer. The name is the canonical one, or that of
the original checkpoints (CompVis latent-diffusion, Stability AI generative-models), which is the family's to say.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from contextlib import suppress

from lora_forge.contracts import LayerKey
from lora_forge.errors import LoraForgeError
from lora_forge.records import FileLayout

RECORD_KEY = "lora_forge"  # of the metadata: the run's own record, as JSON
# A UNet with two resnets per block: each block is three ldm blocks long.
_STRIDE = 3
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
}
_SAMPLER = re.compile(r"(down|up)_blocks\.(\d+)\.\1samplers\.0\.conv\Z")
# Every layer that carries a LoRA in CLIP text encoders and a UNet with two resnets per block, and no other.
_TEXT_LAYER = re.compile(
    r"(?:text_model\.encoder\.layers\.(?:0|[1-9][0-9]?)\.(?:self_attn\.(?:q|k|v|out)_proj|mlp\.fc[12])"
    r"|text_projection)\Z"
)
_LAYERS = {
    "text_encoder": _TEXT_LAYER,
    "text_encoder_2": _TEXT_LAYER,
    "unet": re.compile(
        r"(?:(?:down_blocks\.[0-3]\.(?:attentions|resnets)\.[01]|up_blocks\.[0-3]\.(?:attentions|resnets)\.[0-2]"
        r"|mid_block\.(?:attentions\.0|resnets\.[01]))\."
        r"(?:(?<=attentions\..\.)(?:proj_in|proj_out|transformer_blocks\.(?:0|[1-9][0-9]?)\."
        r"(?:attn[12]\.(?:to_q|to_k|to_v|to_out\.0)|ff\.net\.(?:0\.proj|2)))"
        r"|(?<=resnets\..\.)(?:conv1|conv2|time_emb_proj|conv_shortcut))"
        r"|(down|up)_blocks\.[0-3]\.\1samplers\.0\.conv"
        r"|(?:time|add)_embedding\.linear_[12]|conv_in|conv_out)\Z"
    ),
}
_BLOCK = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions)\.(\d+)\.(.+)\Z")


def universal_name(layout: FileLayout, component: str, layer: str) -> str:
    """A layer's name in a family's universal layout, without the `.lora_down.weight` and so on.

    Raises LoraForgeError for a layer the layout has no name for.
    """
    if component not in layout.prefixes:
        raise LoraForgeError(f"the universal layout has no name for {component}.{layer}")
    name = ldm_path(layer) if component in layout.ldm_names else layer
    return f"{layout.prefixes[component]}_{name}".replace(".", "_")


def ldm_path(layer: str) -> str:
    """A diffusers path of a UNet layer as the path in the original checkpoint."""
    if layer in _OUTSIDE:
        return _OUTSIDE[layer]
    sampler = _SAMPLER.match(layer)
    if sampler:  # the original has them at the end of a block; in SDXL, only after attentions
        last = _STRIDE * int(sampler.group(2))
        return f"input_blocks.{last + 3}.0.op" if sampler.group(1) == "down" else f"output_blocks.{last + 2}.2.conv"
    match = _BLOCK.match(layer)
    if match is None:
        raise LoraForgeError(f"the universal layout has no name for unet.{layer}")
    side, block, kind, index, rest = (
        match.group(1),
        int(match.group(2) or 0),
        match.group(3),
        int(match.group(4)),
        match.group(5),
    )
    inner = _RESNET.get(rest, rest) if kind == "resnets" else rest
    within = 0 if kind == "resnets" else 1
    if side == "down":
        return f"input_blocks.{_STRIDE * block + index + 1}.{within}.{inner}"
    if side == "up":
        return f"output_blocks.{_STRIDE * block + index}.{within}.{inner}"
    return f"middle_block.{2 * index if kind == 'resnets' else 1}.{inner}"


def diffusers_name(component: str, layer: str) -> str:
    """A layer's name in diffusers' spelling, without `.lora_A.weight` and so on."""
    return f"{component}.{layer}"


def is_layer(component: str | None, layer: str | None) -> bool:
    """Whether a canonical name is that of a layer of a CLIP text encoder or a UNet, as SD 1.x, 2 and XL have them."""
    pattern = _LAYERS.get(component or "")
    return pattern is not None and layer is not None and pattern.match(layer) is not None


def own_names(keys: Iterable[LayerKey], layout: FileLayout | None) -> dict[str, LayerKey]:
    """What our own savers call these layers, in either spelling: of a family from a plugin, nobody else knows."""
    names: dict[str, LayerKey] = {}
    for key in keys:
        names[diffusers_name(*key)] = key
        if layout:
            with suppress(LoraForgeError):  # the layout may not have names for all layers
                names[universal_name(layout, *key)] = key
    return names


def file_stem(prompt: str) -> str:
    """The prompt's words as a file name that is safe everywhere, without a suffix."""
    words = re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")[:60].rstrip("_") or "prompt"
    if not prompt.isascii():  # what was left out may be all that tells two prompts apart
        words += f"_{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"
    return f"{words}_lora"


def missing_siblings(layers: list[str]) -> dict[str, str]:
    """Attention projections of text encoders that readers demand beside those there, with a sibling each.

    diffusers drops q, k and v of a block without `out_proj`, and A1111 applies encoder 2's attention only
    if q, k, v and out are all there.
    """
    present = set(layers)
    missing = {}
    for layer in layers:
        block, _, leaf = layer.rpartition(".")
        if leaf not in ("q_proj", "k_proj", "v_proj", "out_proj"):
            continue
        for other in ("q_proj", "k_proj", "v_proj", "out_proj"):
            if f"{block}.{other}" not in present:
                missing[f"{block}.{other}"] = layer
    return missing
