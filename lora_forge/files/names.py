"""What a target layer is called in a LoRA file: the universal layout, and diffusers' spelling.

Universal is the one layout that diffusers, ComfyUI, Forge, A1111, InvokeAI and sd-scripts all read whole:
`lora_unet_<ldm block names>`, `lora_te1_text_model_…`, `lora_te2_text_model_…`, `.lora_down.weight`,
`.lora_up.weight`, and `.alpha` for every layer. ldm block names are those of the original checkpoints
(CompVis latent-diffusion, Stability AI generative-models).
"""

from __future__ import annotations

import hashlib
import re

from lora_forge.errors import LoraForgeError

# A UNet of this family has two resnets per block, so each block is three ldm blocks long.
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
}
_BLOCK = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions)\.(\d+)\.(.+)\Z")
_ENCODER_PREFIX = {
    "sdxl": {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
}


def universal_name(family: str, component: str, layer: str) -> str:
    """A layer's name in the universal layout, without the `.lora_down.weight` and so on.

    Raises LoraForgeError for a family or layer the layout has no name for.
    """
    prefixes = _ENCODER_PREFIX.get(family)
    if prefixes is None:
        raise LoraForgeError(f"the universal layout has no names for the family {family!r}; choose another saver")
    if component == "unet":
        return f"lora_unet_{ldm_path(layer)}".replace(".", "_")
    if component not in prefixes:
        raise LoraForgeError(f"the universal layout has no name for {component}.{layer}")
    return f"{prefixes[component]}_{layer}".replace(".", "_")


def ldm_path(layer: str) -> str:
    """A diffusers path of a UNet layer as the path in the original checkpoint."""
    if layer in _OUTSIDE:
        return _OUTSIDE[layer]
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
