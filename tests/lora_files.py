"""LoRA files made for tests: whole ones of every kind, and broken ones byte by byte."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Q_PROJ = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
TO_K = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
CONV = "lora_unet_input_blocks_1_0_in_layers_2"


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def pair(name: str, out: int, inputs: int, *, rank: int = 2, alpha: float | None = 1.0) -> dict[str, torch.Tensor]:
    """A linear layer in kohya's spelling."""
    tensors = {
        f"{name}.lora_down.weight": numbers(rank, inputs, seed=1),
        f"{name}.lora_up.weight": numbers(out, rank, seed=2),
    }
    return tensors if alpha is None else {**tensors, f"{name}.alpha": torch.tensor(alpha)}


def small_sdxl() -> dict[str, torch.Tensor]:
    """Two linear layers and a convolution, of three components."""
    return {
        **pair(Q_PROJ, 6, 5),
        **pair(Q_PROJ.replace("te1", "te2"), 6, 5),
        **pair(TO_K, 4, 7),
        f"{CONV}.lora_down.weight": numbers(2, 3, 3, 3),
        f"{CONV}.lora_up.weight": numbers(4, 2, 1, 1),
        f"{CONV}.alpha": torch.tensor(1.0),
    }


def saved(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path, dict(metadata) if metadata else None)
    return path


def raw(
    path: Path, header: bytes | str | Mapping[str, Any], content: bytes = b"", *, length: int | None = None
) -> Path:
    """A file of exactly this header and content, right or wrong."""
    if isinstance(header, Mapping):
        header = json.dumps(header)
    data = header.encode() if isinstance(header, str) else header
    path.write_bytes((len(data) if length is None else length).to_bytes(8, "little") + data + content)
    return path


def entry(begin: int, end: int, *, dtype: str = "F32", shape: list[int] | None = None) -> dict[str, Any]:
    """What a header says of a tensor."""
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}
