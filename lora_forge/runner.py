"""The run, top to bottom: initial weights, the step loop, strength, effect, file.

All prompts of a call train side by side in one bank; a single run is a bank of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_forge.bank import Bank
from lora_forge.batch import ModelView, texts_by_encoder
from lora_forge.clock import Clock
from lora_forge.contracts import LoraWeights
from lora_forge.effect.measure import Effect, measure_effect
from lora_forge.effect.tokens import TokenShift, token_shifts
from lora_forge.errors import ObjectiveError, blaming
from lora_forge.events import RunFailure, RunFinish, RunInfo, RunStart
from lora_forge.initial import initial_weights
from lora_forge.model import LoadedModel
from lora_forge.objective import Objective, Term, backward
from lora_forge.optimizers import end_training, start_optimizers
from lora_forge.plan import Plan, Request, short_digest
from lora_forge.plugins import Registry
from lora_forge.reach import Reach
from lora_forge.result import RunResult, Values
from lora_forge.saving import save_lora, write_report
from lora_forge.steps import StepLog
from lora_forge.strength import scale_to_strength, strength_warnings

if TYPE_CHECKING:
    from lora_forge.preview.of_run import RunPreview


def forge(
    plan: Plan, requests: Sequence[Request], model: LoadedModel, registry: Registry, clock: Clock
) -> list[RunResult]:
    """Make one LoRA per request, and write those that name an output.

    Observers hear of it; what they raise ends nothing. Raises ObjectiveError when the objective cannot
    train what was asked for, RunFailed when a term becomes NaN or infinite or a plugin raises.
    """
    ids = [short_digest(plan.record_of(request)) for request in requests]
    batch_id = short_digest(ids)
    runs = [
        RunInfo(id, batch_id, r.prompt, plan.model.name, plan.iterations, r.seed)
        for id, r in zip(ids, requests, strict=True)
    ]
    try:
        with model.use(plan, clock):
            started = [RunStart(run, plan.record_of(r)) for run, r in zip(runs, requests, strict=True)]
            notes = [registry.notify("lora_forge_run_started", event) for event in started]
            trained = _train(plan, requests, runs, model, registry, clock, notes)
        results = _results(plan, requests, runs, trained, model, clock, notes)
    except BaseException as error:
        for run in runs:
            for note in registry.notify("lora_forge_run_failed", RunFailure(run, error)):
                error.add_note(note)
        raise
    return [_announced(registry, run, result) for run, result in zip(runs, results, strict=True)]


def _announced(registry: Registry, run: RunInfo, result: RunResult) -> RunResult:
    """The result once its observers have seen it, with what went wrong in them."""
    notes = registry.notify("lora_forge_run_finished", RunFinish(run, result))
    return replace(result, warnings=(*result.warnings, *notes))


@dataclass(frozen=True)
class _Trained:
    """What the step loop leaves behind, for all prompts: lists and banks are in the requests' order."""

    bank: Bank
    log: StepLog
    reach: Reach
    after: list[Values]
    effects: list[Effect]
    factors: list[float]
    tokens: list[list[TokenShift]]


def _train(
    plan: Plan,
    requests: Sequence[Request],
    runs: Sequence[RunInfo],
    model: LoadedModel,
    registry: Registry,
    clock: Clock,
    notes: Sequence[list[str]],
) -> _Trained:
    with clock.phase("prepare"):
        bank = Bank(model.layers, rank=plan.rank, alpha=plan.alpha, prompts=len(requests), device=model.device)
        bank.fill(initial_weights(plan, model, requests))
        view = ModelView(model.backend, model.slot, _texts(plan, requests), [r.seed for r in requests], model.device)
        for own, cut in zip(notes, _cut_texts(view), strict=True):
            own += cut
        objective = Objective([Term(t.label, t.weight, t.needs, t.chosen.build()) for t in plan.terms], view)
        make = plan.optimizer.build()
        with blaming(f"optimizer {plan.optimizer.name!r}"):
            elementwise = plan.optimizer_spec.elementwise
            optimizers = start_optimizers(make, bank, elementwise=elementwise, iterations=plan.iterations)
        for saver in plan.savers:
            saver.build()  # one that cannot be built is better known now than after the last step
        log = StepLog(runs, registry, notes)
    model.slot.bank = bank

    with clock.phase("steps"):
        reach = Reach(bank)
        for step in range(1, plan.iterations + 1):
            values, total = _gradient(objective, bank, view)
            if step == 1:
                reach.check(plan)
            norms = bank.gradient_norms()
            l2 = bank.add_l2(plan.l2)
            with blaming(f"optimizer {plan.optimizer.name!r}"):
                for optimizer in optimizers:
                    optimizer.step()
            log.record(step, total.detach() + l2, values, l2, norms)
        log.deliver()
        with blaming(f"optimizer {plan.optimizer.name!r}"):
            end_training(optimizers)
        if plan.iterations == 0:
            _gradient(objective, bank, view)
            reach.check(plan)

    with clock.phase("measure"):
        factors = scale_to_strength(plan, bank, view)
        after = _evaluate(plan, objective, bank, view, log)
        effects = measure_effect(bank, view, reach.reached, plan.load)
        tokens = token_shifts(view) if plan.config.report else [[] for _ in requests]
        return _Trained(bank, log, reach, after, effects, factors, tokens)


def _results(
    plan: Plan,
    requests: Sequence[Request],
    runs: Sequence[RunInfo],
    trained: _Trained,
    model: LoadedModel,
    clock: Clock,
    notes: Sequence[list[str]],
) -> list[RunResult]:
    made = [trained.bank.weights(index) for index in range(len(requests))]
    previews: Sequence[RunPreview | None] = [None] * len(requests)
    if plan.config.preview:
        from lora_forge.preview.of_run import preview_run

        with clock.phase("preview"):
            previews = preview_run(plan, requests, made, model, notes)
    with clock.phase("save"):
        results = []
        for i, request in enumerate(requests):
            result = _result(plan, request, runs[i], i, made[i], trained, model, previews[i], clock, notes[i])
            results.append(write_report(plan, request, result, trained.tokens[i], previews[i]))
        return results


def _gradient(objective: Objective, bank: Bank, view: ModelView) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Fill the bank's gradient with that of the prompts' *sum*: it does not scale with their number."""
    bank.zero_gradient()
    view.begin_step()
    values = objective.values()
    total = objective.total(values)
    if not total.requires_grad:
        raise ObjectiveError(f"the objective ({', '.join(values)}) depends on no trainable layer")
    with blaming("the objective's gradient"):
        backward(total)
    return values, total


def _evaluate(plan: Plan, objective: Objective, bank: Bank, view: ModelView, log: StepLog) -> list[Values]:
    """The objective of the weights as they are now, checked like a step's."""
    view.begin_evaluation()
    with torch.no_grad(), blaming("the objective"):
        values = objective.values()
        l2 = bank.l2(plan.l2)
        return log.read(plan.iterations, objective.total(values) + l2, values, l2)


def _texts(plan: Plan, requests: Sequence[Request]) -> dict[str, list[str]]:
    """One text per prompt for each encoder in use; the second encoder and later read `prompt_2` if given."""
    first = plan.backend_spec.encoders[:1]
    return texts_by_encoder(plan.encoders, first, [(r.prompt, r.prompt_2) for r in requests])


def _cut_texts(view: ModelView) -> list[list[str]]:
    """Per prompt, what of it the model does not read, in words."""
    return [
        [f"the prompt is longer than the model reads; this is cut off: {text!r}" for text in texts]
        for texts in view.cut_texts()
    ]


def _result(
    plan: Plan,
    request: Request,
    run: RunInfo,
    index: int,
    weights: LoraWeights,
    trained: _Trained,
    model: LoadedModel,
    preview: RunPreview | None,
    clock: Clock,
    notes: Sequence[str],
) -> RunResult:
    effect, reach, factor = trained.effects[index], trained.reach, trained.factors[index]
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
    steps = tuple(trained.log.values[index])
    after = trained.after[index]
    return RunResult(
        run=run,
        path=saved.files[0] if saved.files else None,
        files=saved.files,
        weights=weights,
        rank=plan.rank,
        alpha=plan.alpha,
        steps=steps,
        before=steps[0] if steps else after,
        after=after,
        effect=effect,
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
