"""Writing what a run made: checked before anything heavy, written by savers, moved into place when all is whole."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_forge import __version__
from lora_forge.choices import Chosen
from lora_forge.contracts import LayerKey, LoraWeights, SaveReport, SaveRequest
from lora_forge.errors import LoraForgeError, OutputError, PluginError, RunFailed, blaming
from lora_forge.files.names import RECORD_KEY
from lora_forge.naming import OutputFiles
from lora_forge.output import Place, appearing, check_output, place_of
from lora_forge.plan import Plan, Request, portable

if TYPE_CHECKING:
    from lora_forge.effect.measure import Effect
    from lora_forge.effect.tokens import TokenShift
    from lora_forge.preview.of_run import RunPreview
    from lora_forge.result import RunResult

RECORD_FORMAT = 1


@dataclass(frozen=True)
class SavedFiles:
    """What became of the files: layers left out, layers padded with zeros, metadata of the first, warnings.

    files: all that were written, the LoRA first. rounding: ‖ΔW as saved − ΔW‖ / ‖ΔW‖, the largest of all layers; 0 in
    float32.
    """

    files: tuple[Place, ...]
    dropped: tuple[str, ...]
    padded: tuple[str, ...]
    metadata: Mapping[str, str]
    rounding: float
    warnings: tuple[str, ...]


def check_saving(plan: Plan) -> Place | None:
    """Check that all the run writes can be written, without writing; where, or None if no output was asked for.

    Raises OutputError, or PluginError for a saver that cannot write the model family's target layers.
    """
    config = plan.config
    if config.output is None:
        beside = [name for name in ("sidecar", "report", "preview") if getattr(config, name)]
        if beside:
            raise OutputError(f"{beside[0]} is written beside the LoRA, and no output is given")
        return None
    output = place_of(config.output)
    if isinstance(output, Path) and os.path.isdir(output) and not plan.saver_specs[0].folder:
        raise OutputError(f"output {config.output!r} is a directory; give the file's name in it too")
    for place, folder in plan.files(output):
        check_output(place, overwrite=config.overwrite, folder=folder)
    _check_names(plan)
    return output


def _check_names(plan: Plan) -> None:
    layout = plan.backend_spec.layout
    named = layout.prefixes if layout else {}
    # Layers that are left out of the file need no name.
    targeted = [
        c for c, layers in plan.model.targets.items() if layers and (c in plan.load or plan.config.inert != "drop")
    ]
    nameless = [component for component in targeted if component not in named]
    needing = [spec.name for spec in plan.saver_specs if spec.needs_layout]
    if needing and nameless:
        raise PluginError(
            f"saver {needing[0]!r} has no names for layers of {', '.join(nameless)}, since backend "
            f"{plan.backend.name!r} says none (BackendSpec.layout); choose another saver, such as 'diffusers'"
        )


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
    preview: RunPreview | None,
) -> SavedFiles:
    """Have the savers write all layers but those dropped, and describe them; nothing if no output was asked for.

    Raises OutputError when the disk refuses, RunFailed when a saver raises, or the numbers do not fit the dtype they
    are saved in.
    """
    kept: LoraWeights = {}
    for component, layers in weights.items():
        for layer, pair in layers.items():
            if (component, layer) not in dropped:
                kept.setdefault(component, {})[layer] = pair
    kept, rounding = _rounded(kept, plan.config.dtype_out)
    common = {**_common_metadata(plan), **(preview.cover if preview else {})}
    saves = []
    for saver in plan.savers:
        record = _record(plan, request, saver, effect, strength, device)
        metadata = {**common, RECORD_KEY: json.dumps(record, sort_keys=True, ensure_ascii=False)}
        saves.append(
            SaveRequest(
                path=Path(),
                weights=kept,
                rank=plan.rank,
                alpha=plan.alpha,
                family=family,
                prompt=request.prompt,
                metadata=metadata,
                layout=plan.backend_spec.layout,
            )
        )
    names = tuple(f"{component}.{layer}" for component, layer in dropped)
    if request.output is None:
        return SavedFiles((), names, (), saves[0].metadata, rounding, ())
    files = plan.files(request.output)
    padded, warnings = _write(plan, saves, files, preview)
    if padded and dropped:
        warnings.append(f"{len(padded)} layers of zeros stand in for left-out ones, as the format demands them")
    beside = [files.sidecar, files.preview if preview else None]
    written = [*(place for place, _ in files.saved), *(place for place in beside if place is not None)]
    return SavedFiles(tuple(written), names, padded, saves[0].metadata, rounding, tuple(warnings))


def write_report(
    plan: Plan, request: Request, result: RunResult, tokens: Sequence[TokenShift], preview: RunPreview | None
) -> RunResult:
    """Write the run's page beside its LoRA, if it was asked for; the result that names it too."""
    page = plan.files(request.output).report if request.output else None
    if page is None:
        return result
    from lora_forge.pages.page import write_page
    from lora_forge.pages.run_page import run_page

    named = replace(result, files=(*result.files, page))
    try:
        write_page(page, run_page(named, tokens, preview.grid if preview else None), overwrite=plan.config.overwrite)
    except LoraForgeError as error:  # the LoRA itself is there
        return replace(result, warnings=(*result.warnings, f"no report: {error}"))
    return named


def _write(
    plan: Plan, saves: list[SaveRequest], files: OutputFiles, preview: RunPreview | None
) -> tuple[tuple[str, ...], list[str]]:
    """Write the LoRA with each saver, and what stands beside it, to appear together; layers of zeros, and notes."""
    padded: dict[str, None] = {}
    notes: list[str] = []
    with ExitStack() as stack:  # what is entered first appears last: once the LoRA itself is there, all is
        for (place, folder), saver, save in zip(files.saved, plan.savers, saves, strict=True):
            made = stack.enter_context(appearing(place, overwrite=plan.config.overwrite, folder=folder))
            write = saver.build()
            with blaming(f"saver {saver.name!r}", but=(OSError,)):
                report = write(replace(save, path=made))
            if not _holds_something(made, folder=folder):
                raise RunFailed(f"saver {saver.name!r} wrote nothing")
            if isinstance(report, SaveReport):
                padded |= dict.fromkeys(report.padded)
                notes += [f"saver {saver.name!r}: {note}" for note in report.notes]
        if files.sidecar:
            made = stack.enter_context(appearing(files.sidecar, overwrite=plan.config.overwrite))
            text = json.dumps(
                {**_kept(files.sidecar), "activation text": saves[0].prompt}, indent=1, ensure_ascii=False
            )
            made.write_text(text + "\n", encoding="utf-8")
        if files.preview and preview:
            made = stack.enter_context(appearing(files.preview, overwrite=plan.config.overwrite))
            made.write_bytes(preview.grid)
        for place, folder in files:  # what has come to be meanwhile is known before any of them appears
            check_output(place, overwrite=plan.config.overwrite, folder=folder)
    return tuple(padded), notes


def _kept(sidecar: Place) -> dict[str, Any]:
    """What a side file that is replaced holds beside the prompt: user interfaces put people's own notes there."""
    try:
        known = json.loads(sidecar.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def _holds_something(path: Path, *, folder: bool) -> bool:
    if folder:
        return path.is_dir() and any(path.iterdir())
    return path.is_file() and path.stat().st_size > 0


def _rounded(weights: LoraWeights, name: str) -> tuple[LoraWeights, float]:
    """The weights in another dtype, and the largest relative error that makes in a layer's ΔW."""
    import torch

    dtype = getattr(torch, name)
    if dtype == torch.float32:
        return weights, 0.0
    rounded: LoraWeights = {}
    largest = 0.0
    for component, layers in weights.items():
        for layer, pair in layers.items():
            own = {key: tensor.to(dtype) for key, tensor in pair.items()}
            if not all(bool(tensor.isfinite().all()) for tensor in own.values()):
                raise RunFailed(f"{component}.{layer}: its numbers are beyond {name}; --dtype-out float32 holds them")
            rounded.setdefault(component, {})[layer] = own
            largest = max(largest, _delta_error(pair, own))
    return rounded, largest


def _delta_error(exact: Mapping[str, Any], rounded: Mapping[str, Any]) -> float:
    """‖B'A' − BA‖ / ‖BA‖, Frobenius, from Gram matrices in float64: B'A' − BA = [B', −B] · [A'; A]."""
    import torch

    up, down = exact["lora_B"].double(), exact["lora_A"].double()
    ups, downs = torch.cat([rounded["lora_B"].double(), -up], 1), torch.cat([rounded["lora_A"].double(), down], 0)
    squares = [((u.T @ u) * (d @ d.T)).sum().clamp_min(0) for u, d in ((ups, downs), (up, down))]
    return math.sqrt(float(squares[0] / squares[1])) if squares[1] > 0 else 0.0


def _common_metadata(plan: Plan) -> dict[str, str]:
    """What does not depend on the saver: the family's own, the base model's name, and a date if one was given."""
    layout, date = plan.backend_spec.layout, plan.config.date
    metadata = {**(layout.metadata if layout else {}), "ss_sd_model_name": portable(plan.base_model)}
    if date:
        moment = datetime.fromisoformat(date)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        metadata |= {"modelspec.date": date, "ss_training_started_at": f"{moment.timestamp():.0f}"}
    return metadata


def versions() -> dict[str, str]:
    """Versions of what a run's numbers come from, as the file records them."""
    packages = ("torch", "transformers", "diffusers", "peft", "safetensors")
    own = {"lora-forge": __version__, "python": platform.python_version()}
    return own | {name: version(name) for name in packages}


def _record(
    plan: Plan, request: Request, saver: Chosen, effect: Effect, strength: float, device: str
) -> dict[str, Any]:
    return {
        "format": RECORD_FORMAT,
        "run": plan.record_of(request, saver),
        "strength": strength,
        "effect": effect.as_dict(),
        "device": device.partition(":")[0],
        "versions": versions(),
    }
