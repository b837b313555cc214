"""Merging LoRAs: one LoRA whose ΔW is the weighted sum of theirs, exactly, or of a given rank and as near as can be."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

from lora_forge.contracts import LayerKey
from lora_forge.conversion.convert import (
    Source,
    family_metadata,
    known_family,
    layout_of,
    network_metadata,
    output_named,
    read_source,
)
from lora_forge.errors import LoraFileError
from lora_forge.files.family import recorded_run
from lora_forge.files.formats import FOLDERS, lay_out, write_format
from lora_forge.files.layer_tensors import Layers, LayerTensors
from lora_forge.files.scaling import scaled
from lora_forge.output import appearing, check_apart, check_output
from lora_forge.plugins import discover
from lora_forge.recognition import OpenRegistry

if TYPE_CHECKING:
    import torch

RECORD_KEY = "lora_forge_merge"
_MOST_TAGS = 100  # of each file: user interfaces show no metadata from a header above 1 MiB


@dataclass(frozen=True)
class Weighted:
    """A LoRA file or PEFT folder, and what its ΔW is multiplied by."""

    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class RankError:
    """What a component lost to `rank`, ‖ΔW - ΔW'‖ / ‖ΔW‖, over all its layers and of the layer that lost the most."""

    component: str
    relative: float
    largest: float
    layer: str


@dataclass(frozen=True)
class Merge:
    """What was written: where, its layers, what each component lost if a rank was asked for, remarks for the user."""

    output: Path
    layers: Layers
    errors: tuple[RankError, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Reduced:
    layer: LayerTensors
    squared_norm: float
    squared_error: float


def merge(
    inputs: Sequence[Weighted],
    output: Path,
    format: str = "safetensors",
    *,
    rank: int | None = None,
    family: str | None = None,
    overwrite: bool = False,
    registry: OpenRegistry = discover,
) -> Merge:
    """Write one LoRA whose ΔW is Σ weight · ΔW of the inputs, in a format of `FORMATS`.

    rank: without it ranks are concatenated, and nothing is lost but the rounding of B; with it, each layer is the
        nearest of that rank (truncated SVD). output, registry: as `convert` takes them. Raises LoraFileError for files
        that cannot be merged and OutputError for an output that cannot be written; nothing is written then.
    """
    output = output_named(output, format)
    check_apart([one.path for one in inputs], output)
    check_output(output, overwrite=overwrite, folder=format in FOLDERS)
    for one in inputs:
        if not math.isfinite(one.weight) or one.weight == 0:
            raise LoraFileError(f"{str(one.path)!r}: a weight of {one.weight:g} makes no sense")
    sources = [read_source(one.path, registry=registry) for one in inputs]
    known = known_family(sources, family, registry)
    layout = layout_of(known, format, registry)
    parts = _parts(inputs, sources)
    reduced = {key: _reduced(*key, own, rank) for key, own in parts.items()} if rank is not None else {}
    layers = {key: one.layer for key, one in reduced.items()} or {key: _joined(*key, own) for key, own in parts.items()}
    laid = lay_out(layers, format)
    metadata = {
        **(layout.metadata if layout else {}),
        **network_metadata(laid.layers),
        **_metadata(inputs, sources, rank),
        **family_metadata(known, {}),
    }
    with appearing(output, overwrite=overwrite, folder=format in FOLDERS) as temporary:
        write_format(temporary, format, laid.layers, layout, metadata)
    notes = [f"{len(laid.padded)} layers of zeros added, as readers of the format demand them"] if laid.padded else []
    return Merge(output, laid.layers, tuple(_errors(reduced)), tuple(notes))


def _parts(inputs: Sequence[Weighted], sources: Sequence[Source]) -> dict[LayerKey, list[tuple[float, LayerTensors]]]:
    """What each layer is the sum of: scale and tensors. Raises LoraFileError for layers of unlike sizes."""
    parts: dict[LayerKey, list[tuple[float, LayerTensors]]] = {}
    for one, source in zip(inputs, sources, strict=True):
        for key, layer in source.layers.items():
            before = parts.setdefault(key, [])
            if before and _size(before[0][1]) != _size(layer):
                sizes = f"{_size(layer)} and not {_size(before[0][1])}"
                raise LoraFileError(f"{str(one.path)!r}: {'.'.join(key)} is {sizes}, as in the files before it")
            before.append((one.weight * layer.scale, layer))
    return parts


def _size(layer: LayerTensors) -> list[int]:
    """[out, in], and of a convolution its window."""
    return [layer.up.shape[0], *layer.down.shape[1:]]


def _joined(component: str, name: str, parts: Sequence[tuple[float, LayerTensors]]) -> LayerTensors:
    """The sum, its rank the sum of theirs. B is float32 where a narrower dtype would round it."""
    import torch

    ups = [scaled(one.up, scale, f"{component}.{name}", widen=True).tensor for scale, one in parts]
    down = torch.cat([one.down for _, one in parts])
    return LayerTensors(down, torch.cat(ups, 1), float(down.shape[0]))


def _reduced(component: str, name: str, parts: Sequence[tuple[float, LayerTensors]], rank: int) -> _Reduced:
    """The nearest layer of `rank` (Eckart and Young 1936), alpha = rank, in the widest dtype of the parts.

    Never the full matrix: QR of both factors, then the SVD of the small core between them, float64. The error is that
    of what is stored, rounding included.
    """
    import torch

    first = parts[0][1]
    up = torch.cat([one.up.flatten(1).double() * scale for scale, one in parts], 1)
    down = torch.cat([one.down.flatten(1).double() for _, one in parts])
    where = f"{component}.{name}"
    if not bool(up.float().isfinite().all()):
        raise LoraFileError(f"{where}: its numbers times alpha / rank (and weight, if any) are beyond float32")
    (q_up, r_up), (q_down, r_down) = torch.linalg.qr(up), torch.linalg.qr(down.T)
    try:
        left, singular, right = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    except RuntimeError as error:  # torch.linalg.LinAlgError
        raise LoraFileError(f"{where}: no singular values can be found for it") from error
    kept = min(rank, len(singular))
    root = singular[:kept].sqrt()
    dtype = reduce(torch.promote_types, (tensor.dtype for _, one in parts for tensor in (one.up, one.down)))
    new_up, new_down = (q_up @ left[:, :kept]) * root, root[:, None] * (right[:kept] @ q_down.T)
    stored = [tensor.to(dtype) for tensor in (new_up, new_down)]
    if not all(bool(tensor.isfinite().all()) for tensor in stored):
        raise LoraFileError(f"{where}: the sum has numbers beyond {str(dtype).removeprefix('torch.')}")
    lost = _core(torch.cat([up, -stored[0].double()], 1), torch.cat([down, stored[1].double()]))
    layer = LayerTensors(
        stored[1].reshape(kept, *first.down.shape[1:]),
        stored[0].reshape(first.up.shape[0], kept, *first.up.shape[2:]),
        float(kept),
    )
    return _Reduced(layer, float((singular**2).sum()), float((lost**2).sum()))


def _core(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """A small matrix with the singular values of `up @ down`."""
    import torch

    core: torch.Tensor = torch.linalg.qr(up, mode="r").R @ torch.linalg.qr(down.T, mode="r").R.T
    return core


def _errors(reduced: Mapping[LayerKey, _Reduced]) -> list[RankError]:
    result = []
    for component in dict.fromkeys(component for component, _ in reduced):
        own = {layer: one for (its, layer), one in reduced.items() if its == component}
        relative = {layer: _ratio(one.squared_error, one.squared_norm) for layer, one in own.items()}
        worst = max(relative, key=lambda layer: relative[layer])
        total = _ratio(sum(one.squared_error for one in own.values()), sum(one.squared_norm for one in own.values()))
        result.append(RankError(component, total, relative[worst], worst))
    return result


def _ratio(squared_error: float, squared_norm: float) -> float:
    return math.sqrt(squared_error / squared_norm) if squared_norm else 0.0


def _metadata(inputs: Sequence[Weighted], sources: Sequence[Source], rank: int | None) -> dict[str, str]:
    """What was merged, for people and for programs; of folders that a file was in, nothing."""
    names = [{"name": one.path.name, "weight": one.weight} for one in inputs]
    phrases = [_phrase(source) for source in sources]
    joined = ", ".join(dict.fromkeys(filter(None, phrases)))
    parts = zip(inputs, sources, phrases, strict=True)
    tags = {one.path.stem: _tags(source, phrase) for one, source, phrase in parts}
    bases = {source.metadata.get("ss_sd_model_name", "") for source in sources}
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": " + ".join(f"{one.weight:g} · {one.path.stem}" for one in inputs),
        "modelspec.description": f"merged from {', '.join(f'{one.path.name} × {one.weight:g}' for one in inputs)}",
        **({"modelspec.trigger_phrase": joined} if joined else {}),
        **({"ss_tag_frequency": json.dumps(tags, ensure_ascii=False)} if any(tags.values()) else {}),
        **({"ss_sd_model_name": bases.pop()} if len(bases) == 1 and any(bases) else {}),
        RECORD_KEY: json.dumps({"format": 1, "files": names, "rank": rank}, sort_keys=True, ensure_ascii=False),
    }


def _phrase(source: Source) -> str:
    """What calls a file's LoRA up: as its metadata says, or the prompt it was made for; "" if neither is there."""
    told = source.metadata.get("modelspec.trigger_phrase") or recorded_run(source.metadata).get("prompt")
    return told if isinstance(told, str) else ""


def _tags(source: Source, phrase: str) -> dict[str, int]:
    """The commonest tags of what a file was trained on, and how many times each; its phrase if it tells none."""
    counts: Counter[str] = Counter()
    try:
        for folder in json.loads(source.metadata.get("ss_tag_frequency", "{}")).values():
            counts.update({str(tag): int(count) for tag, count in folder.items()})
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        counts.clear()
    return dict(counts.most_common(_MOST_TAGS)) or ({phrase: 1} if phrase else {})
