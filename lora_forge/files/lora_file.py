"""Anybody's LoRA file, opened: what it holds layer by layer, from its header alone. No tensor library is imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from lora_forge.errors import LoraFileError, quoted
from lora_forge.files.adapter_config import WEIGHTS, AdapterConfig, read_config, read_metadata_configs
from lora_forge.files.family import family_of_layers, recorded_family, told_family
from lora_forge.files.header import Header, StoredTensor, read_header
from lora_forge.files.numbered import numbered_layers
from lora_forge.files.shapes import delta_shape, inner_rank, misfits
from lora_forge.files.spelling import COMPONENTS, Spelled, read_indexed, read_name


@dataclass(frozen=True)
class Part:
    """One tensor of a layer: the file it is in, its key there, and what the header says of it."""

    file: Path
    key: str
    stored: StoredTensor


@dataclass(frozen=True)
class FileLayer:
    """A layer as a file has it.

    name: the file's own. component, layer: canonical; None where the name does not tell. kind: `lora`, `dora`,
    or LyCORIS's `loha`, `lokr`, `full` and so on. parts: by what they are (`down`, `up`, `mid`, `alpha`, …).
    """

    name: str
    component: str | None
    layer: str | None
    kind: str
    parts: Mapping[str, Part]

    @property
    def rank(self) -> int | None:
        """The inner dimension: what alpha is divided by. None for kinds that have none."""
        return inner_rank(self.kind, self.parts)

    @property
    def is_plain(self) -> bool:
        """Whether ΔW is alpha / rank · up @ down, and nothing else."""
        return self.kind == "lora" and {"down", "up"} <= set(self.parts) <= {"down", "up", "alpha"}

    @property
    def shape(self) -> tuple[int, int] | None:
        """(out, in) of ΔW, the inputs of a convolution's window together; None where the shapes do not tell."""
        return delta_shape(self.kind, self.parts)


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file, or a folder of PEFT's.

    format: `kohya`, `lycoris`, `diffusers`, `diffusers-old`, `peft`, `cloneofsimo`, `mixed`, or `none` for a file
    without a LoRA layer. family: as its own record says, else its metadata, else its layers: `sdxl`, `sd15`, `sd2`,
    `distribution:name` of another backend, or None where nothing tells. unknown: keys that are in no spelling of a
    LoRA. faults: what makes it unfit to load, in words that name a key: formats mixed, a layer that is there twice,
    tensors that are no layer together. configs: what PEFT's folders say of alpha, by weight file.
    """

    path: Path
    headers: Mapping[Path, Header]
    format: str
    family: str | None
    layers: tuple[FileLayer, ...]
    unknown: tuple[str, ...]
    faults: tuple[str, ...] = ()
    configs: Mapping[Path, AdapterConfig] = field(default_factory=dict)

    @cached_property
    def metadata(self) -> Mapping[str, str]:
        return {name: text for header in self.headers.values() for name, text in header.metadata.items()}

    @cached_property
    def metadata_configs(self) -> Mapping[str, AdapterConfig]:
        """What diffusers' metadata says of alpha, by component; nobody reads it beside another spelling."""
        return read_metadata_configs(self.metadata) if self.format == "diffusers" else {}

    @property
    def size(self) -> int:
        """Bytes on disk, of weight files."""
        return sum(header.size for header in self.headers.values())


def open_lora(path: Path, prefixes: Mapping[str, str] = MappingProxyType({})) -> LoraFile:
    """A LoRA by its file, or by PEFT's folder: one adapter, or one folder of them per component.

    prefixes: components by what names of their layers start with, where a family has its own (`FileLayout.prefixes`).
    Raises LoraFileError for a file that is broken, or is no safetensors file.
    """
    found = dict(_adapters(path)) if path.is_dir() else {path: None}
    headers = {file: read_header(file) for file in found}
    layers: dict[tuple[Path, str], dict[str, Part]] = {}
    spelled: dict[tuple[Path, str], Spelled] = {}
    formats: dict[str, str] = {}
    unknown = []
    for file, header in headers.items():
        for key, stored in header.tensors.items():
            read = read_name(key, found[file], prefixes) or read_indexed(key)
            if read is None:
                unknown.append(key)
                continue
            parts = layers.setdefault((file, read.name), {})
            if read.part in parts:
                both = f"{quoted(parts[read.part].key)} and {quoted(key)}"
                raise LoraFileError(f"{str(path)!r}: {both} are the same tensor of one layer")
            parts[read.part] = Part(file, key, stored)
            if read.part not in ("alpha", "dora_scale"):  # of kohya's spelling and others alike
                formats.setdefault(read.format, key)
                spelled[file, read.name] = read
            spelled.setdefault((file, read.name), read)
    made = tuple(
        FileLayer(name, spelled[file, name].component, spelled[file, name].layer, _kind(parts), parts)
        for (file, name), parts in layers.items()
    )
    format = _format(set(formats))
    if format == "cloneofsimo":
        made = _named(made)
    faults = [_mixed(formats)] if format == "mixed" else []
    faults += [*_twice(made), *(fault for layer in made for fault in misfits(layer.kind, layer.parts))]
    configs = {file: config for file in found if (config := read_config(file)) is not None}
    metadata = {name: text for header in headers.values() for name, text in header.metadata.items()}
    family = recorded_family(metadata) or told_family(metadata) or family_of_layers(made)
    return LoraFile(path, headers, format, family, made, tuple(unknown), tuple(faults), configs)


def _named(layers: tuple[FileLayer, ...]) -> tuple[FileLayer, ...]:
    """Numbered layers with the paths that their numbers stand for, where all of a component's are there."""
    # An alpha alone may have a name of any other kind beside them.
    numbered = [layer for layer in layers if read_indexed(f"{layer.name}:up")]
    numbers = {layer.name: int(layer.name.rpartition(":")[2]) for layer in numbered}
    paths: dict[str, str | None] = {}
    for component in {layer.component for layer in numbered}:
        own = [layer for layer in numbered if layer.component == component]
        known = numbered_layers(component or "", {numbers[layer.name]: layer.shape for layer in own})
        paths |= {layer.name: known.get(numbers[layer.name]) for layer in own}
    return tuple(replace(layer, layer=paths.get(layer.name, layer.layer)) for layer in layers)


def _adapters(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Weight files of a folder of PEFT's, and the component each is of where the folder's name says so."""
    files = [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else sorted(folder.glob(f"*/{WEIGHTS}"))
    if not files:
        raise LoraFileError(f"{str(folder)!r} is a folder without {WEIGHTS} in it")
    for file in files:
        name = file.parent.name
        yield file, name if name in COMPONENTS else None


def _kind(parts: Mapping[str, Part]) -> str:
    if "dora_scale" in parts:
        return "dora"
    if {"down", "up"} & set(parts):
        return "lora"
    if "diff" in parts or "diff_b" in parts:
        return "full"
    first = next((part for part in parts if part not in ("alpha", "scalar")), "").partition("_")[0]
    if first.endswith(".weight"):
        return "glora"
    return {"hada": "loha", "on": "ia3"}.get(first, first or "alpha alone")


def _format(names: set[str]) -> str:
    if not names:
        return "none"
    if len(names) == 1:
        return next(iter(names))
    return "lycoris" if names == {"kohya", "lycoris"} else "mixed"


def _mixed(formats: Mapping[str, str]) -> str:
    shown = [f"{quoted(key)} is {format}" for format, key in formats.items()]
    return f"it mixes formats, which no reader loads whole: {', '.join(shown)}"


def _twice(layers: Sequence[FileLayer]) -> Iterator[str]:
    """Layers of different names that are one and the same: a file that mixes two tools' names for blocks."""
    seen: dict[tuple[str | None, str], str] = {}
    for layer in layers:
        if layer.layer is None:
            continue
        first = seen.setdefault((layer.component, layer.layer), layer.name)
        if first != layer.name:
            yield f"{quoted(first)} and {quoted(layer.name)} are the same layer"
