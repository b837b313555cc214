"""What is left once training is done: previews, files, results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_forge.clock import Clock
from lora_forge.contracts import LoraWeights
from lora_forge.model import LoadedModel
from lora_forge.plan import Plan, Request
from lora_forge.result import RunResult
from lora_forge.saving import save_lora, write_report
from lora_forge.training.strength import strength_warnings
from lora_forge.training.train import Trained

if TYPE_CHECKING:
    from lora_forge.preview.of_run import RunPreview


def finish(trained: Trained, indices: Sequence[int], model: LoadedModel) -> list[RunResult]:
    """The results of these prompts of a batch, none of which failed, and the files of those that name an output.

    Needs nothing of the model that training uses, so that the next batch may train meanwhile; but a preview lets go
    of the model. Raises OutputError when the disk refuses, RunFailed when a saver raises.
    """
    plan, clock = trained.plan, Clock(dict(trained.clock.seconds))
    made = [trained.bank.weights(index) for index in indices]
    previews: Sequence[RunPreview | None] = [None] * len(made)
    if plan.config.preview:
        from lora_forge.preview.of_run import preview_run

        own = [trained.notes[index] for index in indices]
        with clock.phase("preview"):
            previews = preview_run(plan, [trained.requests[index] for index in indices], made, model, own)
    results = []
    with clock.phase("save"):
        for index, weights, preview in zip(indices, made, previews, strict=True):
            result = _result(trained, index, weights, model, preview, clock)
            results.append(write_report(plan, trained.requests[index], result, trained.tokens[index], preview))
    return results


def _result(
    trained: Trained,
    index: int,
    weights: LoraWeights,
    model: LoadedModel,
    preview: RunPreview | None,
    clock: Clock,
) -> RunResult:
    plan, request, reach = trained.plan, trained.requests[index], trained.reach
    effect, factor = trained.effects[index], trained.factors[index]
    saved = save_lora(
        plan,
        request,
        weights,
        effect,
        reach.dropped(plan, index),
        strength=factor,
        family=model.backend.family,
        device=model.device,
        preview=preview,
    )
    steps, after, notes = tuple(trained.steps[index]), trained.after[index], trained.notes[index]
    return RunResult(
        run=trained.runs[index],
        path=saved.files[0] if saved.files else None,
        files=saved.files,
        weights=weights,
        rank=plan.rank,
        alpha=plan.alpha,
        steps=steps,
        before=trained.before[index],
        after=after,
        updates=trained.updates[index],
        seconds_per_step=clock.seconds["steps"] / trained.taken if trained.taken else None,
        effect=effect,
        measured=trained.measured[index],
        probe=trained.probes[index] if trained.probes else None,
        inert=tuple(f"{component}.{layer}" for component, layer in reach.inert),
        dropped=saved.dropped,
        padded=saved.padded,
        strength=factor,
        rounding=saved.rounding,
        warnings=(*notes, *reach.warnings(plan, index), *strength_warnings(plan, factor), *saved.warnings),
        metadata=saved.metadata,
        usage=_usage(plan, request, model),
        seconds=clock.seconds,
    )


def _usage(plan: Plan, request: Request, model: LoadedModel) -> str:
    """The lines of Python that use the first file of this machine, if there is one: not of folders, nor of URLs."""
    if request.output is None:
        return model.backend.usage("lora.safetensors", request.prompt)
    places = [place for place, folder in plan.files(request.output).saved if not folder and isinstance(place, Path)]
    return model.backend.usage(str(places[0]), request.prompt) if places else ""
