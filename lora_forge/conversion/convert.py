"""Converting a LoRA file between formats, there and back: what a format demands is recorded in it, and undone."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_forge.errors import LoraFileError, OutputError
from lora_forge.files.family import FAMILY_KEY, recorded_family
from lora_forge.files.formats import FOLDERS, FORMATS, lay_out, write_format
from lora_forge.files.header import url_of
from lora_forge.files.layer_tensors import Layers, named_keys, read_layers, torch_dtype
from lora_forge.files.scaling import by_component, with_alpha
from lora_forge.naming import suffix_problem
from lora_forge.output import appearing, check_apart, check_output
from lora_forge.plugins import discover
from lora_forge.recognition import Family, OpenRegistry, families_here, named_family, open_known
from lora_forge.records import FileLayout

if TYPE_CHECKING:
    import torch

RECORD_KEY = "lora_forge_convert"
# What no longer holds once tensors are called, or are, something else.
_STALE = (RECORD_KEY, "lora_adapter_metadata", "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
_SPELLED = {
    "kohya": "safetensors",
    "lycoris": "safetensors",
    "diffusers": "diffusers",
    "diffusers-old": "diffusers",
    "peft": "peft",
    "cloneofsimo": "diffusers",  # the nearest: one file, and alpha = rank
}


@dataclass(frozen=True)
class Before:
    """What a component was: one alpha and rank. widened: layers whose B was of A's dtype, `component.layer`."""

    alpha: float
    rank: int
    alpha_dtype: str
    widened: tuple[str, ...]


@dataclass(frozen=True)
class Record:
    """How a file differs from the one it was converted from.

    original: the format of that. padded: layers of zeros it had not, `component.layer`. before: by component.
    """

    original: str
    padded: tuple[str, ...]
    before: Mapping[str, Before]


@dataclass(frozen=True)
class Source:
    """A LoRA file as it was before any conversion: its layers, its metadata, and the format it has now.

    format: one of `FORMATS`. spelling: the same as `inspect` calls it, which knows more of them.
    """

    path: Path
    format: str
    spelling: str
    family: Family
    layers: Layers
    metadata: Mapping[str, str]
    record: Record | None
    dropped: tuple[str, ...]


@dataclass(frozen=True)
class Conversion:
    """What became of a file: where it is, its format before and now, as `inspect` calls them, and what is in it.

    dropped: keys left out. notes: remarks for the user.
    """

    output: Path
    original: str
    format: str
    layers: Layers
    dropped: tuple[str, ...]
    notes: tuple[str, ...]


def read_source(path: Path, *, drop_unknown: bool = False, registry: OpenRegistry = discover) -> Source:
    """A LoRA file or PEFT folder, with the padding and folding of an earlier conversion undone.

    Raises LoraFileError as `open_lora` and `read_layers` do.
    """
    lora, family = open_known(path, registry)
    layers, dropped = read_layers(lora, drop_unknown=drop_unknown)
    record = _read_record(lora.metadata, path)
    if record:
        layers = _undone(layers, record)
    return Source(path, _SPELLED[lora.format], lora.format, family, layers, lora.metadata, record, dropped)


def convert(
    source: Path,
    output: Path,
    format: str,
    *,
    drop_unknown: bool = False,
    family: str | None = None,
    overwrite: bool = False,
    registry: OpenRegistry = discover,
) -> Conversion:
    """Write the LoRA in `source` to `output` in another format, one of `FORMATS`, with the same ΔW.

    output: a file's name without a suffix gets `.safetensors`, as `Conversion.output` tells.
    family: what the file is a LoRA of, where nothing in it tells. registry: gives the plugins there are; called only
    for a file that may be of a plugin's family. Raises LoraFileError for a file that cannot be converted and
    OutputError for an output that cannot be written; nothing is written then.
    """
    output = output_named(output, format)
    check_apart([source], output)
    check_output(output, overwrite=overwrite, folder=format in FOLDERS)
    read = read_source(source, drop_unknown=drop_unknown, registry=registry)
    original = read.record.original if read.record else read.format
    going_back = read.record is not None and format == original
    laid = lay_out(read.layers, format, pad=not going_back)
    known = known_family([read], family, registry)
    layout = layout_of(known, format, registry)
    metadata = {**(layout.metadata if layout else {}), **_kept(read.metadata), **family_metadata(known, read.metadata)}
    if format == "safetensors":
        metadata = {**network_metadata(laid.layers), **metadata}
    before = _before(read.layers, laid.layers, laid.widened)
    if format != original and (laid.padded or before):
        metadata[RECORD_KEY] = _written(Record(original, laid.padded, before))
    with appearing(output, overwrite=overwrite, folder=format in FOLDERS) as temporary:
        write_format(temporary, format, laid.layers, layout, metadata)
    notes = list(laid.notes)
    if laid.widened:
        notes.append(f"{len(laid.widened)} layers have their B in float32, since their dtype is too narrow for it")
    if laid.padded:
        notes.append(f"{len(laid.padded)} layers of zeros added, as readers of the format demand them")
    if read.dropped:
        notes.append(f"left out: {named_keys(read.dropped)}")
    return Conversion(output, read.spelling, spelling_of(format), laid.layers, read.dropped, tuple(notes))


def output_named(output: Path, format: str) -> Path:
    """What is written where `output` was asked for. Raises OutputError for the name of something else."""
    if url := url_of(output):
        raise OutputError(f"output {url!r} is a URL; what is converted or merged is written on this machine")
    suffix = "" if format in FOLDERS else ".safetensors"
    if problem := suffix_problem(output.name, f"--to {format}", suffix):
        raise OutputError(f"output {str(output)!r}: {problem}")
    named = output.name.lower().endswith(suffix) or not output.name or os.path.isdir(output)
    return output if named else output.with_name(output.name + suffix)


def known_family(sources: Sequence[Source], name: str | None, registry: OpenRegistry) -> Family:
    """The family the files are LoRAs of: what they tell, or what `name` says, which may stand for one that is not here.

    Raises LoraFileError where those contradict, PluginError for a name that no backend has.
    """
    given = named_family(name, registry) if name else None
    told: dict[str, Source] = {}
    for source in sources:
        if source.family.name and not (given and source.family.missing):
            told.setdefault(source.family.name, source)
    if given and set(told) - {given.name}:
        other = next(one for one in told if one != given.name)
        raise LoraFileError(f"{str(told[other].path)!r} is a LoRA of {other}, not of {given.name}")
    if len(told) > 1:
        shown = ", ".join(f"{str(source.path)!r} of {one}" for one, source in told.items())
        raise LoraFileError(f"LoRAs of different families are no one LoRA: {shown}")
    return given or next((source.family for source in told.values()), Family(None))


def layout_of(family: Family, format: str, registry: OpenRegistry) -> FileLayout | None:
    """A family's universal layout. Raises LoraFileError where `format` needs one and there is none."""
    layout = family.spec.layout if family.spec else None
    if layout or format != "safetensors":
        return layout
    known = " or ".join(sorted(str(one.name) for one in families_here(registry) if one.spec and one.spec.layout))
    if family.name is None:
        raise LoraFileError(f"nothing in the file tells what it is a LoRA of; --family {known} says it")
    if family.missing:
        raise LoraFileError(
            f"it is a LoRA of {family}, and only that backend has the names of its layers: install it, or load it with "
            f"--plugin FILE.py; or --family {known} says which of those here is the same"
        )
    raise LoraFileError(
        f"'safetensors' has names for LoRAs of {known} only, and this is one of {family}; --to diffusers and --to peft "
        "need none"
    )


def family_metadata(family: Family, metadata: Mapping[str, str]) -> dict[str, str]:
    """What tells the family of a file that has no record of it, where that is a plugin's."""
    return {FAMILY_KEY: family.told_as} if family.told_as and not recorded_family(metadata) else {}


def spelling_of(format: str) -> str:
    """What `inspect` calls a format of `FORMATS`."""
    return "kohya" if format == "safetensors" else format


def network_metadata(layers: Layers) -> dict[str, str]:
    """What sd-scripts has to find in a file."""
    ranks = {one.rank for one in layers.values()}
    alphas = {one.alpha for one in layers.values()}
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
        "ss_network_args": "{}",
    }


def _kept(metadata: Mapping[str, str]) -> dict[str, str]:
    return {name: text for name, text in metadata.items() if name not in _STALE}


def _before(layers: Layers, after: Layers, widened: Collection[str]) -> dict[str, Before]:
    """What to restore of the components that had one rank and alpha, and now have another, or nowhere to say it."""
    result = {}
    now = by_component(after)
    for component, own in by_component(layers).items():
        first = next(iter(own.values()))
        alike = {(one.rank, one.alpha, one.alpha_dtype) for one in own.values()}
        changed = next(iter(now[component].values())).alpha != first.alpha or first.alpha_dtype != "F32"
        if len(alike) == 1 and changed:
            inner = tuple(name for name in widened if name.startswith(f"{component}."))
            result[component] = Before(first.alpha, first.rank, first.alpha_dtype, inner)
    return result


def _undone(layers: Layers, record: Record) -> Layers:
    """The layers without the recorded padding and folding, as far as they still are what the record says."""
    padded = set(record.padded)
    result = {key: one for key, one in layers.items() if f"{key[0]}.{key[1]}" not in padded or bool(one.up.any())}
    own = by_component(result)
    before = {
        component: was
        for component, was in record.before.items()
        if all(one.rank == was.rank and one.alpha in (one.rank, was.alpha) for one in own.get(component, {}).values())
    }
    result, _, _ = with_alpha(result, {component: was.alpha for component, was in before.items()})
    for (component, layer), one in result.items():
        if component in before:
            was = before[component]
            narrow = f"{component}.{layer}" in was.widened
            up = _narrowed(one.up, one.down.dtype) if narrow else one.up
            result[component, layer] = replace(one, up=up, alpha_dtype=was.alpha_dtype)
    return result or layers


def _narrowed(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    narrow = tensor.to(dtype)
    return narrow if bool(narrow.isfinite().all()) else tensor


def _written(record: Record) -> str:
    return json.dumps({"format": 1, **asdict(record)}, sort_keys=True, ensure_ascii=False)


def _read_record(metadata: Mapping[str, str], path: Path) -> Record | None:
    """What an earlier conversion recorded. Raises LoraFileError where that cannot be so."""
    if RECORD_KEY not in metadata:
        return None
    try:
        data = json.loads(metadata[RECORD_KEY])
        before = {str(component): _read_before(was) for component, was in data["before"].items()}
        record = Record(data["original"], tuple(map(str, data["padded"])), before)
        if data["format"] != 1 or record.original not in FORMATS:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise LoraFileError(f"{str(path)!r}: its metadata {RECORD_KEY!r} is not what a conversion writes") from error
    return record


def _read_before(data: Any) -> Before:
    was = Before(float(data["alpha"]), int(data["rank"]), data["alpha_dtype"], tuple(map(str, data["widened"])))
    torch_dtype(was.alpha_dtype)
    if was.alpha == 0 or not math.isfinite(was.alpha):
        raise ValueError
    return was
