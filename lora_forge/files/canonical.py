"""Writing safetensors canonically: the same content gives the same bytes in every process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors (on the CPU) and metadata, the header's keys in sorted order.

    The library lays the tensors out; only the header is written anew, since the library's own order of
    metadata differs between processes.
    """
    from safetensors.torch import save

    content = memoryview(save({name: tensor.contiguous() for name, tensor in tensors.items()}))
    length = int.from_bytes(content[:8], "little")
    header = json.loads(bytes(content[8 : 8 + length]))
    if metadata:
        header["__metadata__"] = dict(metadata)
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        file.write(content[8 + length :])
