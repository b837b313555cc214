"""The header of a safetensors file, read alone: no tensor is touched and nothing heavy imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_forge.errors import LoraFileError

_LARGEST = 100_000_000  # bytes; what the safetensors library allows


def read_header(path: Path) -> dict[str, Any]:
    """The header as it stands: tensor name to dtype, shape and offsets, and `__metadata__`.

    Raises LoraFileError when the file is missing, or is not safetensors.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if 2 <= length <= _LARGEST else b""
    except (OSError, ValueError) as error:  # ValueError: a path that can be none
        raise LoraFileError(f"{str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or len(text) != length:
        raise LoraFileError(f"{str(path)!r} is not a safetensors file")
    return header


def read_metadata(path: Path) -> dict[str, str]:
    """The strings a file stores beside its tensors. Raises LoraFileError as `read_header` does."""
    metadata = read_header(path).get("__metadata__") or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise LoraFileError(f"{str(path)!r} is not a safetensors file: its metadata is not text")
    return metadata
