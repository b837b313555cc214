"""Tensors of a LoRA file, read one at a time as numpy arrays: what a file does is told without importing torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lora_forge.errors import LoraFileError, quoted
from lora_forge.files.lora_file import FileLayer, LoraFile, Part

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]

# The largest layer of any base model, an embedding of the vocabulary, is smaller; what is not is no LoRA's, and
# memory stays bounded whatever a file says of itself.
LARGEST_TENSOR = 2**26
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}
_BY_HAND = ("BF16", "F8_E5M2", "F8_E4M3")


def read_array(lora: LoraFile, part: Part) -> Array:
    """A tensor's numbers, float32, in its own shape.

    Raises LoraFileError for a dtype that is no number's in a LoRA, and for more than `LARGEST_TENSOR` numbers.
    """
    stored = part.stored
    where = f"{part.file.name!r}: {quoted(part.key)}"
    if stored.dtype not in _NUMPY and stored.dtype not in _BY_HAND:
        raise LoraFileError(f"{where} is {stored.dtype}, which is not read")
    if math.prod(stored.shape) > LARGEST_TENSOR:
        raise LoraFileError(f"{where} is too large to be a LoRA's: {math.prod(stored.shape)} numbers")
    return _numbers(read_bytes(lora, part, where), stored.dtype).reshape(stored.shape)


def read_bytes(lora: LoraFile, part: Part, where: str) -> bytearray:
    """A tensor's bytes, by place: what was checked in the header is what is read.

    Raises LoraFileError, starting with `where`, for what cannot be read or is no longer all there.
    """
    stored = part.stored
    try:
        with part.file.open("rb") as file:
            file.seek(lora.headers[part.file].start + stored.begin)
            content = bytearray(file.read(stored.end - stored.begin))
    except OSError as error:
        raise LoraFileError(f"{where} cannot be read: {error.strerror}") from error
    if len(content) != stored.end - stored.begin:
        raise LoraFileError(f"{where} is cut off")
    return content


def layer_alpha(lora: LoraFile, layer: FileLayer) -> float | None:
    """A layer's alpha: its own tensor, PEFT's config, or diffusers' metadata; None where the file has none.

    Raises LoraFileError for an alpha that is not one number.
    """
    if "alpha" in layer.parts:
        alpha = layer.parts["alpha"]
        if math.prod(alpha.stored.shape) != 1:
            raise LoraFileError(f"{quoted(alpha.key)} is not one number")
        return float(read_array(lora, alpha).reshape(()))
    configs = [lora.configs[part.file] for part in layer.parts.values() if part.file in lora.configs]
    config = configs[0] if configs else lora.metadata_configs.get(layer.component or "")
    return config.alpha_of(layer.layer or layer.name, layer.rank) if config else None


def _numbers(content: bytearray, dtype: str) -> Array:
    import numpy as np

    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(content, "<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype == "F8_E5M2":  # the upper half of a float16
        return (np.frombuffer(content, "u1").astype(np.uint16) << 8).view(np.float16).astype(np.float32)
    if dtype == "F8_E4M3":
        codes = np.arange(256)
        exponent, fraction = codes >> 3 & 15, codes & 7
        sizes = np.where(exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (exponent - 7))
        sizes[codes & 127 == 127] = np.nan  # there are no infinities
        table: Array = np.where(codes < 128, sizes, -sizes).astype(np.float32)
        numbers: Array = table[np.frombuffer(content, "u1")]
        return numbers
    with np.errstate(over="ignore"):  # a float64 beyond float32 is infinite, and told of as such
        return np.frombuffer(content, _NUMPY[dtype]).astype(np.float32)
