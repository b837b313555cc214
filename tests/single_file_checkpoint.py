"""Writes a diffusers folder as one checkpoint in the original layout, for tests of reading one."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
UNET, SECOND = "model.diffusion_model.", "conditioner.embedders.1.model."
FIRST = {"sdxl": "conditioner.embedders.0.transformer.", "sd15": "cond_stage_model.transformer."}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OPENCLIP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
_OPENCLIP_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def write_single_file(family: str, folder: Path, path: Path) -> Path:
    """The text encoders and the UNet of a diffusers folder, in one file."""
    first = load_file(folder / "text_encoder" / "model.safetensors")
    content = {FIRST[family] + name: tensor for name, tensor in first.items()}
    if family == "sdxl":
        second = load_file(folder / "text_encoder_2" / "model.safetensors")
        content |= {SECOND + name: tensor for name, tensor in openclip(second).items()}
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    with_attention = {name.split(".")[1] for name in unet if name.startswith("up_blocks.") and ".attentions." in name}
    for name, tensor in unet.items():
        module, _, kind = name.rpartition(".")
        content[f"{UNET}{original_unet_name(module, with_attention)}.{kind}"] = tensor
    save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)
    return path


def openclip(second: Tensors) -> Tensors:
    """The second encoder as OpenCLIP has it: q, k and v in one, the projection transposed."""
    result = {"text_projection": second["text_projection.weight"].T}
    result |= {other: second[name] for name, other in _OPENCLIP.items()}
    for name, tensor in second.items():
        match = re.match(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$", name)
        if not match:
            continue
        number, module, kind = match.groups()
        block = f"transformer.resblocks.{number}."
        if module in _OPENCLIP_BLOCK:
            result[f"{block}{_OPENCLIP_BLOCK[module]}.{kind}"] = tensor
        elif module == "self_attn.q_proj":
            parts = [second[name.replace("q_proj", leaf)] for leaf in ("q_proj", "k_proj", "v_proj")]
            result[f"{block}attn.in_proj_{kind}"] = torch.cat(parts)
    return result


def original_unet_name(module: str, with_attention: set[str]) -> str:
    """A UNet module's name in the original checkpoint; with_attention: the up blocks that have attentions."""
    if module in _OUTSIDE:
        return _OUTSIDE[module]
    side, _, rest = module.partition("_block")
    if side == "mid":
        kind, index, inner = re.match(r"\.(resnets|attentions)\.(\d+)\.(.+)$", rest).groups()  # type: ignore[union-attr]
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}.{_RESNET.get(inner, inner)}"
    block, kind, index, inner = re.match(r"s\.(\d+)\.(\w+)\.(\d+)\.(.+)$", rest).groups()  # type: ignore[union-attr]
    if kind == "downsamplers":
        return f"input_blocks.{3 * int(block) + 3}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{3 * int(block) + 2}.{2 if block in with_attention else 1}.conv"
    number = 3 * int(block) + int(index) + (1 if side == "down" else 0)
    name = f"{'input' if side == 'down' else 'output'}_blocks.{number}"
    return f"{name}.1.{inner}" if kind == "attentions" else f"{name}.0.{_RESNET[inner]}"
