"""Writing safetensors canonically: the same content gives the same bytes in every process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Where the oldest of the hashes looks, counted from the file's start.
_LEGACY = slice(2**20, 2**20 + 2**16)


def write_safetensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], *, hashes: bool = False
) -> None:
    """Write tensors (on the CPU) and metadata, the header's keys in sorted order.

    hashes: add those that user interfaces know a LoRA by. The library lays the tensors out; only the header is written
    anew, since the library's own order of metadata differs between processes.
    """
    from safetensors.torch import save

    content = memoryview(save({name: tensor.contiguous() for name, tensor in tensors.items()}))
    length = int.from_bytes(content[:8], "little")
    layout, data = json.loads(bytes(content[8 : 8 + length])), content[8 + length :]
    if hashes:
        metadata = {**metadata, **_hashes(layout, data, metadata)}
    with path.open("wb") as file:
        file.write(_head(layout, metadata))
        file.write(data)


def _head(layout: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """What comes before the tensors: the header's length, and the header."""
    header = {**layout, **({"__metadata__": dict(metadata)} if metadata else {})}
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _hashes(layout: Mapping[str, Any], data: memoryview, metadata: Mapping[str, str]) -> dict[str, str]:
    """sd-scripts' (kohya-ss) two, of the file as it would be with the training metadata alone; and ModelSpec's."""
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    head = _head(layout, training)
    start, stop = (max(0, edge - len(head)) for edge in (_LEGACY.start, _LEGACY.stop))
    legacy = hashlib.sha256(head[_LEGACY])
    legacy.update(data[start:stop])
    whole = hashlib.sha256(data).hexdigest()
    return {
        "sshs_model_hash": whole,
        "sshs_legacy_hash": legacy.hexdigest()[:8],
        "modelspec.hash_sha256": f"0x{whole}",
    }
