"""Reading the names in anybody's LoRA file: which layer of which component a tensor belongs to, and as what.

The inverse of `names`, for every spelling in use: diffusers' old and new one, PEFT's, kohya's with diffusers' or with
the original checkpoint's block names, and what LyCORIS adds to it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

# What tensors of a layer are called after its name, and what they are.
_PARTS = {
    ".lora_down.weight": ("kohya", "down"),
    ".lora_up.weight": ("kohya", "up"),
    ".lora_mid.weight": ("kohya", "mid"),
    ".alpha": ("kohya", "alpha"),
    ".dora_scale": ("kohya", "dora_scale"),
    ".lora_A.weight": ("diffusers", "down"),
    ".lora_B.weight": ("diffusers", "up"),
    ".lora_A.default.weight": ("peft", "down"),
    ".lora_B.default.weight": ("peft", "up"),
    ".lora_magnitude_vector": ("diffusers", "dora_scale"),
    ".lora_magnitude_vector.weight": ("diffusers", "dora_scale"),
    ".lora.down.weight": ("diffusers-old", "down"),
    ".lora.up.weight": ("diffusers-old", "up"),
    ".lora_linear_layer.down.weight": ("diffusers-old", "down"),
    ".lora_linear_layer.up.weight": ("diffusers-old", "up"),
    "_lora.down.weight": ("diffusers-old", "down"),
    "_lora.up.weight": ("diffusers-old", "up"),
}
_LYCORIS = re.compile(
    r"\.((?:hada|lokr|oft|boft|ia3|glora)_\w+|oft_diag|diff|diff_b|on_input|scalar|[ab][12]\.weight)\Z"
)
_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
COMPONENTS = ("unet", "text_encoder_2", "text_encoder")
_PEFT = "base_model.model."
_INDEXED = re.compile(r"((unet|text_encoder):[0-9]{1,6}):(up|down|alpha)\Z")
# Words of layer paths that have an underscore of their own; all other underscores of a kohya name are dots.
_WORD = re.compile(
    r"(?:text_model|self_attn|q_proj|k_proj|v_proj|out_proj|text_projection|final_layer_norm|token_embedding"
    r"|position_embedding|layer_norm1|layer_norm2|down_blocks|up_blocks|mid_block|transformer_blocks|time_emb_proj"
    r"|time_embedding|add_embedding|linear_1|linear_2|conv_in|conv_out|conv_shortcut|conv_norm_out|proj_in|proj_out"
    r"|to_q|to_k|to_v|to_out|group_norm|input_blocks|output_blocks|middle_block|in_layers|out_layers|emb_layers"
    r"|skip_connection|time_embed|label_emb)(?=_|\Z)|[^_]+"
)
_LDM = re.compile(r"(input|output|middle)_blocks?\.([0-9]{1,2})(?:\.([0-9]{1,2}))?\.(.+)\Z")
_RESNET = {
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_OUTSIDE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
}


@dataclass(frozen=True)
class Spelled:
    """What a tensor's name says.

    format: `kohya`, `lycoris`, `diffusers`, `diffusers-old` or `peft`. name: the layer as the file names it.
    part: `down`, `up`, `mid`, `alpha`, `dora_scale`, or LyCORIS's own word for it. component, layer: its
    canonical path; None where the name says none.
    """

    format: str
    name: str
    part: str
    component: str | None
    layer: str | None


def read_name(
    key: str, component: str | None = None, prefixes: Mapping[str, str] = MappingProxyType({})
) -> Spelled | None:
    """What a tensor's name says, or None for a name that is in no LoRA's spelling.

    component: of the file it is in, where that is known, as with PEFT's folders. prefixes: of a family's own, such as
    `lora_te3`, with the component of each; they win over those that everybody knows.
    """
    for suffix, (format, part) in _PARTS.items():
        if key.endswith(suffix):
            return _spelled(format, key.removesuffix(suffix), part, component, prefixes)
    match = _LYCORIS.search(key)
    return _spelled("lycoris", key[: match.start()], match.group(1), component, prefixes) if match else None


def read_indexed(key: str) -> Spelled | None:
    """The same for names with a layer's number in place of its path, as cloneofsimo's lora has them."""
    match = _INDEXED.match(key)
    return Spelled("cloneofsimo", match.group(1), match.group(3), match.group(2), None) if match else None


def _spelled(format: str, name: str, part: str, component: str | None, prefixes: Mapping[str, str]) -> Spelled | None:
    families = {f"{prefix}_": own for prefix, own in sorted(prefixes.items(), key=lambda one: -len(one[0]))}
    for prefix, own in [*families.items(), *_PREFIXES.items()]:
        if name.startswith(prefix):
            return Spelled(format, name, part, own, _canonical(own, _dotted(name.removeprefix(prefix))))
    bare = name.removeprefix(_PEFT)
    format = "peft" if bare != name else format
    for own in COMPONENTS:
        if bare.startswith(f"{own}."):
            return Spelled(format, name, part, own, _canonical(own, bare.removeprefix(f"{own}.")))
    if component:
        return Spelled(format, name, part, component, _canonical(component, bare))
    if bare.startswith(("down_blocks.", "up_blocks.", "mid_block.", "conv_", "time_embedding.", "add_embedding.")):
        return Spelled(format, name, part, "unet", _canonical("unet", bare))
    return Spelled(format, name, part, None, None)


def _dotted(flat: str) -> str:
    return ".".join(_WORD.findall(flat))


def _canonical(component: str, layer: str) -> str:
    if component not in COMPONENTS:  # of a family from a plugin
        return layer
    if component != "unet":
        return layer if layer.startswith(("text_model.", "text_projection")) else f"text_model.{layer}"
    # diffusers' first spelling had LoRAs in the attention processors: `attn1.processor.to_q`.
    layer = layer.replace(".processor.", ".")
    return canonical_unet(f"{layer}.0" if layer.endswith(".to_out") else layer)


def canonical_unet(layer: str) -> str:
    """A dotted path of a UNet with the original checkpoint's block names as diffusers' path; others as they are."""
    if layer in _OUTSIDE:
        return _OUTSIDE[layer]
    match = _LDM.match(layer)
    if match is None:
        return layer
    side, number, within, rest = match.groups()
    if side == "middle":
        inner = f"{within}.{rest}" if within is not None else rest
        if number == "1":
            return f"mid_block.attentions.0.{inner}"
        return f"mid_block.resnets.{int(number) // 2}.{_RESNET.get(inner, inner)}"
    shifted = int(number) - (side == "input")
    if shifted < 0:
        return layer
    block = f"{'down' if side == 'input' else 'up'}_blocks.{shifted // 3}"
    if rest == "op":
        return f"{block}.downsamplers.0.conv"
    if rest == "conv" and side == "output":
        return f"{block}.upsamplers.0.conv"
    if within == "0":
        return f"{block}.resnets.{shifted % 3}.{_RESNET.get(rest, rest)}"
    return f"{block}.attentions.{shifted % 3}.{rest}"
