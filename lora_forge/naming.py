"""The files that a run writes, and what they are called."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_forge.config.run import DEFAULT_SAVER
from lora_forge.errors import OutputError
from lora_forge.files.names import file_stem
from lora_forge.records import SaverSpec

if TYPE_CHECKING:
    from lora_forge.output import Place

# What readers of LoRA files and of models take a file for by its suffix alone.
_MODEL_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".pkl", ".sft", ".gguf")


@dataclass(frozen=True)
class OutputFiles:
    """Where everything goes. saved: for each saver where it writes, and whether that is a folder.

    sidecar, report, preview: None where none was asked for.
    """

    saved: tuple[tuple[Place, bool], ...]
    sidecar: Place | None = None
    report: Place | None = None
    preview: Place | None = None

    def __iter__(self) -> Iterator[tuple[Place, bool]]:
        """All of them, and whether each is a folder; the LoRA itself comes first."""
        yield from self.saved
        yield from ((place, False) for place in (self.sidecar, self.report, self.preview) if place is not None)


def default_output(prompt: str) -> Path:
    """`output/<the prompt's words>_lora`."""
    return Path("output") / file_stem(prompt)


def name_files(
    output: Place, savers: Sequence[SaverSpec], *, sidecar: bool, report: bool, preview: bool
) -> OutputFiles:
    """What each file is called: the first saver's as given, the others' `<stem>.<saver><suffix>`, then those beside it.

    output: with the first saver's suffix or without. Raises OutputError for the suffix of another format, and where two
    would be one file.
    """
    first, *others = savers
    stem, given = _split(output, first)
    names = [given, *(f"{stem}.{one.name}{one.suffix}" for one in others)]
    # Its readers look for it beside the file that they read.
    read = next((name for name, one in zip(names, savers, strict=True) if one.name == DEFAULT_SAVER), given)
    noted = f"{stem if read == given else Path(read).stem}.json"
    files = OutputFiles(
        saved=tuple((output.with_name(name), one.folder) for name, one in zip(names, savers, strict=True)),
        sidecar=output.with_name(noted) if sidecar else None,
        report=output.with_name(f"{stem}.html") if report else None,
        preview=output.with_name(f"{stem}.grid.png") if preview else None,
    )
    places = [str(place) for place, _ in files]
    twice = next((place for place in places if places.count(place) > 1), None)
    if twice:
        raise OutputError(f"output {twice!r} would be written twice; give another name, or fewer savers")
    return files


def suffix_problem(name: str, writes: str, suffix: str) -> str:
    """Why a file of this name, written in this format, would not be taken for what it is; "" if it would.

    suffix: the format's own; "" for a folder.
    """
    if suffix and name.lower().endswith(suffix.lower()):
        return ""
    wrong = next((one for one in _MODEL_SUFFIXES if name.lower().endswith(one) and one != suffix.lower()), "")
    if not wrong:
        return ""
    kind = f"{suffix} files" if suffix else "a folder"
    return f"{writes} writes {kind}, not {wrong}; give the name without {wrong}"


def _split(output: Place, saver: SaverSpec) -> tuple[str, str]:
    """The stem that names are made of, and the first file's whole name."""
    name, suffix = output.name, saver.suffix
    if not name or name in (".", ".."):
        raise OutputError(f"output {str(output)!r} names no file")
    if problem := suffix_problem(name, f"saver {saver.name!r}", suffix):
        raise OutputError(f"output {str(output)!r}: {problem}")
    if suffix and name.lower().endswith(suffix.lower()) and len(name) > len(suffix):
        return name[: -len(suffix)], name
    return name, name + suffix
