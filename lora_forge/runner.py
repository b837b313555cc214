"""The run, top to bottom: training, then files and results. Observers hear of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lora_forge.clock import Clock
from lora_forge.events import RunFailure, RunFinish, RunInfo
from lora_forge.finishing import finish
from lora_forge.model import LoadedModel
from lora_forge.plan import Plan, Request, short_digest
from lora_forge.plugins import Registry
from lora_forge.result import RunResult
from lora_forge.training.train import train


def forge(
    plan: Plan, requests: Sequence[Request], model: LoadedModel, registry: Registry, clock: Clock
) -> list[RunResult]:
    """Make one LoRA per request, and write those that name an output.

    Observers hear of it; what they raise ends nothing. Raises ObjectiveError when the objective cannot
    train what was asked for, RunFailed when a term becomes NaN or infinite or a plugin raises.
    """
    runs = run_infos(plan, requests)
    try:
        trained = train(plan, requests, runs, model, registry, clock)
        for failure in filter(None, (trained.failures[index] for index in range(len(requests)))):
            raise failure
        results = finish(trained, range(len(requests)), model)
    except BaseException as error:
        for run in runs:
            for note in announce_failure(registry, run, error):
                error.add_note(note)
        raise
    return [announce_result(registry, result) for result in results]


def run_infos(plan: Plan, requests: Sequence[Request]) -> list[RunInfo]:
    """What the runs of a batch are called, in the requests' order."""
    ids = [plan.run_id(request) for request in requests]
    batch_id = short_digest(ids)
    return [
        RunInfo(id, batch_id, r.prompt, plan.model.name, plan.iterations, r.seed)
        for id, r in zip(ids, requests, strict=True)
    ]


def announce_result(registry: Registry, result: RunResult) -> RunResult:
    """The result once its observers have seen it, with what went wrong in them."""
    notes = registry.notify("lora_forge_run_finished", RunFinish(result.run, result))
    return replace(result, warnings=(*result.warnings, *notes))


def announce_failure(registry: Registry, run: RunInfo, error: BaseException) -> list[str]:
    """What went wrong in those that observe that a run failed."""
    return registry.notify("lora_forge_run_failed", RunFailure(run, error))
