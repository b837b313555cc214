"""The header of a safetensors file, read alone and checked whole: no tensor is touched, nothing heavy imported."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_forge.errors import LoraFileError, quoted

LARGEST_HEADER = 32 * 2**20  # bytes: twenty times that of the largest LoRA there is; parsing takes ten times as much
MOST_TENSORS = 2**16  # six for each layer of the largest model there is, several times over
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.+)\Z", re.DOTALL)
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as the header tells of it: safetensors' name of its dtype, its shape, its place after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """All that a file says of itself. start: where the tensors begin; size: of the whole file, in bytes."""

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    start: int
    size: int


def read_header(path: Path) -> Header:
    """A file's header, checked against itself and against the file's size.

    Raises LoraFileError, naming the tensor if it is one's fault, when the file is missing or no safetensors file:
    truncated, its header too large, with a key twice, with tensors that overlap or lie outside.
    """
    where = repr(str(path))
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # reading a pipe would wait for ever
            raise LoraFileError(f"{where} is not a regular file")
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= size - 8:
                raise LoraFileError(f"{where} is not a safetensors file, or cut off within its header{_pickled(path)}")
            if length > LARGEST_HEADER:
                raise LoraFileError(f"{where}: its header of {length} bytes is too large to be a LoRA's")
            text = file.read(length)
    except (OSError, ValueError) as error:  # ValueError: a path that can be none
        if url_of(path):
            raise LoraFileError(nothing_at(path)) from error
        raise LoraFileError(f"{where} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        data = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except _Duplicate as error:
        raise LoraFileError(f"{where} is broken: the key {quoted(str(error))} is there twice") from error
    except (ValueError, RecursionError) as error:
        raise LoraFileError(f"{where} is not a safetensors file: its header is not JSON") from error
    if not isinstance(data, dict):
        raise LoraFileError(f"{where} is not a safetensors file: its header is not an object")
    metadata = _metadata(data.pop("__metadata__", None), where)
    if len(data) > MOST_TENSORS:
        raise LoraFileError(f"{where}: its {len(data)} tensors are too many to be a LoRA's")
    tensors = {name: _stored(name, entry, where) for name, entry in data.items()}
    _check_places(tensors, size - 8 - length, where)
    return Header(tensors, metadata, 8 + length, size)


def url_of(path: Path) -> str | None:
    """The URL that somebody gave where a path was wanted: of its slashes a path keeps one. None for what is a path."""
    match = _URL.match(str(path))
    return f"{match.group(1)}://{match.group(2)}" if match and not path.exists() else None


def nothing_at(path: Path) -> str:
    """What to say of a path where there is nothing to read."""
    url = url_of(path)
    told = f"{url!r} is a URL, which cannot be read; download it first, and give the file"
    return told if url else f"{str(path)!r} does not exist"


def read_metadata(path: Path) -> Mapping[str, str]:
    """The strings a file stores beside its tensors. Raises LoraFileError as `read_header` does."""
    return read_header(path).metadata


class _Duplicate(Exception):
    """A key that an object has twice."""


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for name, value in pairs:
        if name in data:
            raise _Duplicate(name)
        data[name] = value
    return data


def _metadata(value: Any, where: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise LoraFileError(f"{where} is not a safetensors file: its metadata is not text")
    return value


def _stored(name: str, entry: Any, where: str) -> StoredTensor:
    broken = f"{where} is broken: tensor {quoted(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise LoraFileError(f"{broken} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise LoraFileError(f"{broken} is of an unknown dtype")
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
        raise LoraFileError(f"{broken} has a shape or data_offsets that are no whole numbers")
    begin, end = offsets
    if len(shape) > 8 or (end - begin) * 8 != math.prod(shape) * _BITS[dtype]:
        raise LoraFileError(f"{broken} has another size than its shape and dtype say")
    return StoredTensor(dtype, tuple(shape), begin, end)


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**63 for number in value)


def _check_places(tensors: Mapping[str, StoredTensor], room: int, where: str) -> None:
    place = 0
    for name, tensor in sorted(tensors.items(), key=lambda one: (one[1].begin, one[1].end)):
        if tensor.end > room:
            raise LoraFileError(f"{where} is cut off: tensor {quoted(name)} ends beyond the file")
        if tensor.begin != place:
            fault = "overlaps another" if tensor.begin < place else "does not follow on the one before"
            raise LoraFileError(f"{where} is broken: tensor {quoted(name)} {fault}")
        place = tensor.end
    if place != room:
        raise LoraFileError(f"{where} is broken: {room - place} bytes of it belong to no tensor")


def _pickled(path: Path) -> str:
    """What to say of a file that looks like a pickle, which is never opened."""
    with path.open("rb") as file:
        first = file.read(4)
    zipped, pickled = first == b"PK\x03\x04", first[:1] == b"\x80" and first[1:2] in b"\x02\x03\x04\x05"
    return "; it looks like a pickle, which is never read" if zipped or pickled else ""
