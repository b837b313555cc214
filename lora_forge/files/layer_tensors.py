"""A LoRA file's tensors layer by layer, as they are stored: what converting and merging work on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_forge.contracts import LayerKey, LoraWeights
from lora_forge.errors import LoraFileError, printable
from lora_forge.files.arrays import layer_alpha, read_bytes
from lora_forge.files.lora_file import FileLayer, LoraFile, Part
from lora_forge.files.names import is_layer

if TYPE_CHECKING:
    import torch

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_NAMED = 20  # keys that an error names


@dataclass(frozen=True)
class LayerTensors:
    """One layer: ΔW is `alpha / rank · up @ down`.

    down: `(rank, in)`, of a convolution `(rank, in, height, width)`. up: `(out, rank)`, of a convolution
    `(out, rank, 1, 1)`. Both finite, on the CPU, of the file's own floating-point dtype. alpha: finite and not 0.
    alpha_dtype: as safetensors calls it, of the file's alpha tensor (`F32` where the file has none).
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float
    alpha_dtype: str = "F32"

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


Layers = dict[LayerKey, LayerTensors]


def layers_of(weights: LoraWeights, alpha: float) -> Layers:
    """One prompt's LoRA weights as layers, with the tensors they are."""
    return {
        (component, layer): LayerTensors(pair["lora_A"], pair["lora_B"], alpha)
        for component, own in weights.items()
        for layer, pair in own.items()
    }


def read_layers(lora: LoraFile, *, drop_unknown: bool = False) -> tuple[Layers, tuple[str, ...]]:
    """All layers by component and canonical path, and the keys left out.

    drop_unknown: leave out keys that are in no spelling of a LoRA, and layers that are none of the family's or no
        plain LoRA (DoRA, LyCORIS's other kinds). Raises LoraFileError, naming keys, where there are some otherwise,
        and for whatever makes the rest unfit to load: formats mixed, numbers that are not finite, alpha 0.
    """
    if problem := unnamed_problem(lora):
        raise LoraFileError(problem)
    if lora.faults:
        raise LoraFileError(f"{str(lora.path)!r}: {lora.faults[0]}")
    mapped = [layer for layer in lora.layers if is_layer(layer.component, layer.layer) and layer.is_plain]
    unmapped = _without(lora, mapped)
    if unmapped and not drop_unknown:
        hint = "; convert --drop-unknown leaves them out" if mapped else ""
        raise LoraFileError(f"{str(lora.path)!r}: {_counted(unmapped)}: {named_keys(unmapped)}{hint}")
    if not mapped:
        raise LoraFileError(f"{str(lora.path)!r} holds no LoRA layer" + (" that can be mapped" if unmapped else ""))
    layers = {(layer.component or "", layer.layer or ""): read_layer(lora, layer) for layer in mapped}
    return layers, unmapped


def unnamed_problem(lora: LoraFile) -> str:
    """Why nothing can be done with layers that are only numbered; "" where it is known which layers they are."""
    unnamed = [one for one in lora.layers if one.layer is None] if lora.format == "cloneofsimo" else []
    if not unnamed:
        return ""
    return (
        f"{str(lora.path)!r}: its layers are only numbered, as {printable(unnamed[0].name)!r} is, and they are not all "
        "those of Stable Diffusion 1.x, where it is known which layers the numbers stand for"
    )


def read_layer(lora: LoraFile, layer: FileLayer) -> LayerTensors:
    """One layer of kind `lora`. Raises LoraFileError, naming the key, for what cannot be used."""
    down, up = layer.parts["down"], layer.parts["up"]
    shapes = [part.stored.shape for part in (down, up)]
    if len(shapes[0]) != len(shapes[1]) or len(shapes[0]) not in (2, 4) or 0 in (*shapes[0], *shapes[1]):
        named = " and ".join(f"{printable(part.key)!r} {list(part.stored.shape)}" for part in (down, up))
        raise LoraFileError(f"{str(lora.path)!r}: {named} are no linear layer's and no convolution's")
    alpha = layer_alpha(lora, layer)
    where = f"{str(lora.path)!r}: {printable(layer.parts['alpha'].key if 'alpha' in layer.parts else layer.name)!r}"
    if alpha is not None and (alpha == 0 or not math.isfinite(alpha)):
        raise LoraFileError(f"{where}: alpha is {alpha:g}, and ΔW would be {'0' if alpha == 0 else 'none'}")
    dtype = layer.parts["alpha"].stored.dtype if "alpha" in layer.parts else "F32"
    tensors = (_read(lora, down), _read(lora, up))
    return LayerTensors(*tensors, float(shapes[0][0]) if alpha is None else alpha, dtype if dtype in _DTYPES else "F32")


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that safetensors calls `name`, one of F64, F32, F16 and BF16."""
    import torch

    dtype: torch.dtype = getattr(torch, _DTYPES[name])
    return dtype


def named_keys(keys: Sequence[str]) -> str:
    """Keys as a message names them: the first twenty, made safe to print, and how many more there are."""
    more = f", and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return ", ".join(repr(printable(key)) for key in keys[:_NAMED]) + more


def _without(lora: LoraFile, layers: Sequence[FileLayer]) -> tuple[str, ...]:
    """All keys but those of these layers, in the file's order."""
    taken = {(part.file, part.key) for layer in layers for part in layer.parts.values()}
    return tuple(key for file, header in lora.headers.items() for key in header.tensors if (file, key) not in taken)


def _counted(keys: Sequence[str]) -> str:
    return f"{len(keys)} keys are no plain LoRA's" if len(keys) > 1 else "1 key is no plain LoRA's"


def _read(lora: LoraFile, part: Part) -> torch.Tensor:
    """A tensor as it is stored. Raises LoraFileError if it cannot be read, is no float or not finite."""
    import torch

    stored, where = part.stored, f"{str(lora.path)!r}: {printable(part.key)!r}"
    if stored.dtype not in _DTYPES:
        raise LoraFileError(f"{where} is {stored.dtype}; read are {', '.join(_DTYPES)}")
    content = read_bytes(lora, part, where)
    tensor = torch.frombuffer(content, dtype=torch_dtype(stored.dtype)).reshape(stored.shape)
    if not bool(torch.isfinite(tensor).all()):
        raise LoraFileError(f"{where} is not finite: it holds {'NaN' if bool(tensor.isnan().any()) else 'infinity'}")
    return tensor
