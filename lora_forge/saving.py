"""Writing the file: checked before anything heavy, written by a saver, moved into place in one step."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_forge import __version__
from lora_forge.contracts import LayerKey, LoraWeights, SaveReport, SaveRequest
from lora_forge.errors import OutputError, RunFailed, blaming
from lora_forge.files.names import file_stem
from lora_forge.plan import Plan, Request

if TYPE_CHECKING:
    from lora_forge.effect import Effect

RECORD_KEY = "lora_forge"
RECORD_FORMAT = 1


@dataclass(frozen=True)
class SavedFile:
    """What became of a file: layers left out, layers padded with zeros, metadata, warnings."""

    dropped: tuple[str, ...]
    padded: tuple[str, ...]
    metadata: dict[str, str]
    warnings: tuple[str, ...]


def default_output(prompt: str, suffix: str) -> Path:
    """`output/<the prompt's words>_lora<suffix>`."""
    return Path("output") / f"{file_stem(prompt)}{suffix}"


def check_output(path: Path, *, overwrite: bool) -> None:
    """Check that a file can be written at `path`, without leaving one. Raises OutputError."""
    if os.path.isdir(path):
        raise OutputError(f"output {str(path)!r} is a directory")
    if os.path.exists(path) and not overwrite:
        raise OutputError(f"output {str(path)!r} exists; --overwrite replaces it")
    if os.path.exists(path) and not os.path.isfile(path):
        raise OutputError(f"output {str(path)!r} is not a regular file")
    if "\0" in str(path):
        raise OutputError(f"output {str(path)!r} is no path")
    ancestor = next(folder for folder in path.absolute().parents if os.path.exists(folder))
    if not ancestor.is_dir():
        raise OutputError(f"output {str(path)!r}: {str(ancestor)!r} is not a directory")
    try:
        with suppress(FileNotFoundError):
            os.stat(path)  # raises where a name is too long
        with tempfile.NamedTemporaryFile(dir=ancestor, prefix=".lora-forge-"):
            pass
    except OSError as error:
        raise OutputError(f"output {str(path)!r} cannot be written: {error.strerror}") from error


def save_lora(
    plan: Plan,
    request: Request,
    weights: LoraWeights,
    effect: Effect,
    dropped: Collection[LayerKey],
    *,
    strength: float,
    family: str,
    device: str,
) -> SavedFile:
    """Have the saver write all layers but those dropped, and describe it; write nothing if no output was asked for.

    Raises OutputError when the disk refuses, RunFailed when the saver raises.
    """
    kept: LoraWeights = {}
    for component, layers in weights.items():
        for layer, pair in layers.items():
            if (component, layer) not in dropped:
                kept.setdefault(component, {})[layer] = pair
    metadata = {
        RECORD_KEY: json.dumps(_record(plan, request, effect, strength, device), sort_keys=True, ensure_ascii=False)
    }
    if plan.config.date:
        metadata["modelspec.date"] = plan.config.date
    names = tuple(f"{component}.{layer}" for component, layer in dropped)
    if request.output is None:
        return SavedFile(names, (), metadata, ())
    save = SaveRequest(
        path=request.output,
        weights=kept,
        rank=plan.rank,
        alpha=plan.alpha,
        family=family,
        prompt=request.prompt,
        metadata=metadata,
    )
    report = _write(plan, save, overwrite=plan.config.overwrite)
    warnings = []
    if report.padded and dropped:
        warnings.append(f"{len(report.padded)} layers of zeros stand in for left-out ones, as the format demands them")
    return SavedFile(names, report.padded, metadata, tuple(warnings))


def _write(plan: Plan, save: SaveRequest, *, overwrite: bool) -> SaveReport:
    """The file appears by atomic rename only, and with the usual permissions."""
    saver = plan.saver.build()
    temporary: Path | None = None
    try:
        save.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            dir=save.path.parent, prefix=f".{save.path.stem[:40]}-", suffix=save.path.suffix
        )
        os.close(handle)
        temporary = Path(name)
        with blaming(f"saver {plan.saver.name!r}", but=(OSError,)):
            report = saver(replace(save, path=temporary))
        if not temporary.is_file() or not temporary.stat().st_size:
            raise RunFailed(f"saver {plan.saver.name!r} wrote nothing")
        check_output(save.path, overwrite=overwrite)
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, save.path)
        temporary = None
    except OSError as error:
        raise OutputError(f"output {str(save.path)!r} cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return report if isinstance(report, SaveReport) else SaveReport()


def versions() -> dict[str, str]:
    """Versions of what a run's numbers come from, as the file records them."""
    packages = ("torch", "transformers", "diffusers", "peft", "safetensors")
    own = {"lora-forge": __version__, "python": platform.python_version()}
    return own | {name: version(name) for name in packages}


def _record(plan: Plan, request: Request, effect: Effect, strength: float, device: str) -> dict[str, Any]:
    return {
        "format": RECORD_FORMAT,
        "run": plan.record_of(request),
        "strength": strength,
        "effect": effect.as_dict(),
        "device": device.partition(":")[0],
        "versions": versions(),
    }


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
