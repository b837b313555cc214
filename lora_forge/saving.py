"""Writing the file: checked before anything heavy, written by a saver, moved into place in one step."""

from __future__ import annotations

import json
import platform
from collections.abc import Collection
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_forge import __version__
from lora_forge.contracts import LayerKey, LoraWeights, SaveReport, SaveRequest
from lora_forge.errors import PluginError, RunFailed, blaming
from lora_forge.files.names import RECORD_KEY, file_stem
from lora_forge.output import appearing
from lora_forge.plan import Plan, Request

if TYPE_CHECKING:
    from lora_forge.effect.measure import Effect

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


def check_saver(plan: Plan) -> None:
    """Check that the saver can write the target layers of the model family. Raises PluginError."""
    layout = plan.backend_spec.layout
    named = layout.prefixes if layout else {}
    # Layers that are left out of the file need no name.
    targeted = [
        c for c, layers in plan.model.targets.items() if layers and (c in plan.load or plan.config.inert != "drop")
    ]
    nameless = [component for component in targeted if component not in named]
    if plan.saver_spec.needs_layout and nameless:
        raise PluginError(
            f"saver {plan.saver.name!r} has no names for layers of {', '.join(nameless)}, since backend "
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
) -> SavedFile:
    """Have the saver write all layers but those dropped, and describe it; write nothing if no output was asked for.

    Raises OutputError when the disk refuses, RunFailed when the saver raises.
    """
    kept: LoraWeights = {}
    for component, layers in weights.items():
        for layer, pair in layers.items():
            if (component, layer) not in dropped:
                kept.setdefault(component, {})[layer] = pair
    layout = plan.backend_spec.layout
    record = json.dumps(_record(plan, request, effect, strength, device), sort_keys=True, ensure_ascii=False)
    metadata = {**(layout.metadata if layout else {}), RECORD_KEY: record}
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
        layout=layout,
    )
    report = _write(plan, save, overwrite=plan.config.overwrite)
    warnings = []
    if report.padded and dropped:
        warnings.append(f"{len(report.padded)} layers of zeros stand in for left-out ones, as the format demands them")
    return SavedFile(names, report.padded, metadata, tuple(warnings))


def _write(plan: Plan, save: SaveRequest, *, overwrite: bool) -> SaveReport:
    saver = plan.saver.build()
    with appearing(save.path, overwrite=overwrite) as temporary:
        with blaming(f"saver {plan.saver.name!r}", but=(OSError,)):
            report = saver(replace(save, path=temporary))
        if not temporary.is_file() or not temporary.stat().st_size:
            raise RunFailed(f"saver {plan.saver.name!r} wrote nothing")
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
