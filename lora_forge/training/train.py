"""Training, top to bottom: initial weights, the step loop, strength, effect.

All prompts of a call train side by side in one bank; a single run is a bank of one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from lora_forge.bank import Bank
from lora_forge.batch import ModelView, texts_by_encoder
from lora_forge.clock import Clock
from lora_forge.config.stopping import StopRule
from lora_forge.effect.measure import Effect, measure_effect
from lora_forge.effect.probe import LossValues, Probe, measure_probe
from lora_forge.effect.tokens import TokenShift, token_shifts
from lora_forge.errors import ObjectiveError, UsageError, blaming
from lora_forge.events import RunInfo, RunStart
from lora_forge.model import LoadedModel
from lora_forge.plan import Plan, Request
from lora_forge.plugins import Registry
from lora_forge.result import Values
from lora_forge.training.capture import Captured, cuda_capture
from lora_forge.training.failures import Failures
from lora_forge.training.first_gradient import Gradients, first_gradients
from lora_forge.training.initial import earlier_weights, initial_weights
from lora_forge.training.keeping import Keeper
from lora_forge.training.measuring import MeasuredLosses, build_terms
from lora_forge.training.objective import Objective, backward
from lora_forge.training.optimizers import end_training, start_optimizers
from lora_forge.training.reach import Reach
from lora_forge.training.solving import solve
from lora_forge.training.steps import StepLog, StepNumbers
from lora_forge.training.strength import scale_to_strength


@dataclass(frozen=True)
class Trained:
    """What the step loop leaves behind, for all prompts: lists and banks are in the requests' order.

    failures: the prompts whose numbers mean nothing. taken: how many steps there were. updates: how many each
    prompt's weights have behind them.
    measured: per prompt, the losses of `--measure`, before and after, by label. probes: None unless asked for.
    notes: each prompt's warnings.
    """

    plan: Plan
    requests: Sequence[Request]
    runs: Sequence[RunInfo]
    bank: Bank
    reach: Reach
    failures: Failures
    steps: list[list[Values]]
    taken: int
    updates: list[int]
    before: list[Values]
    after: list[Values]
    effects: list[Effect]
    factors: list[float]
    tokens: list[list[TokenShift]]
    measured: list[dict[str, tuple[float | None, float | None]]]
    probes: list[Probe] | None
    notes: list[list[str]]
    clock: Clock


def train(
    plan: Plan,
    requests: Sequence[Request],
    runs: Sequence[RunInfo],
    model: LoadedModel,
    registry: Registry,
    clock: Clock,
    unheard: Collection[int] = (),
) -> Trained:
    """Train one LoRA per request; observers hear of the start and of each step, but of those that are `unheard`.

    What ends one prompt's run is among the failures. Raises what ends them all.
    """
    with model.use(plan, clock):
        notes: list[list[str]] = [[] for _ in runs]
        heard = [index for index in range(len(runs)) if index not in unheard]
        for index in heard:
            event = RunStart(runs[index], plan.record_of(requests[index]))
            notes[index] += registry.notify("lora_forge_run_started", event)
        failures = Failures(len(requests))
        log = StepLog(runs, heard, registry, notes, failures)
        return _train(plan, requests, runs, model, log, failures, notes, clock)


def set_up(plan: Plan, requests: Sequence[Request], model: LoadedModel) -> tuple[Bank, ModelView, Objective]:
    """A filled bank, the prompts' view of a model in use, and the objective on it."""
    bank, view, objective = set_up_empty(plan, requests, model)
    earlier = earlier_weights(plan, model.layers)
    gradients: Gradients = {}
    if plan.initializer_spec.gradient:
        gradients = first_gradients(bank, earlier, *_view_and_objective(plan, requests, model))
    bank.fill(initial_weights(plan, model.layers, requests, earlier, gradients))
    return bank, view, objective


def set_up_empty(plan: Plan, requests: Sequence[Request], model: LoadedModel) -> tuple[Bank, ModelView, Objective]:
    """As `set_up`, but every number of the bank is zero."""
    bank = Bank(model.layers, rank=plan.rank, alpha=plan.alpha, prompts=len(requests), device=model.device)
    return bank, *_view_and_objective(plan, requests, model)


def _view(plan: Plan, requests: Sequence[Request], model: LoadedModel, encoders: Sequence[str]) -> ModelView:
    """One text per prompt for each of these encoders; the second encoder and later read `prompt_2` if given."""
    first = plan.backend_spec.encoders[:1]
    texts = texts_by_encoder(encoders, first, [(r.prompt, r.prompt_2) for r in requests])
    return ModelView(model.backend, model.slot, texts, [r.seed for r in requests], model.device)


def _view_and_objective(plan: Plan, requests: Sequence[Request], model: LoadedModel) -> tuple[ModelView, Objective]:
    view = _view(plan, requests, model, plan.encoders)
    objective = Objective(build_terms(plan.terms), view)
    view.content_only = objective.content_only
    return view, objective


def _train(
    plan: Plan,
    requests: Sequence[Request],
    runs: Sequence[RunInfo],
    model: LoadedModel,
    log: StepLog,
    failures: Failures,
    notes: list[list[str]],
    clock: Clock,
) -> Trained:
    with clock.phase("prepare"):
        bank, view, objective = set_up(plan, requests, model)
        for own, cut in zip(notes, _cut_texts(view), strict=True):
            own += cut
        optimizers = [] if plan.closed_form else _optimizers(plan, bank)
        for saver in plan.savers:
            saver.build()  # one that cannot be built is better known now than after the last step
    model.slot.bank = bank
    measured = MeasuredLosses(plan.measured, _view(plan, requests, model, plan.loaded_encoders))
    measured_before = measured.values()

    with clock.phase("steps"):
        reach = Reach(bank)
        capture = partial(cuda_capture, model.device) if _capturable(plan, model) else None
        gradient = Captured(partial(_gradient, plan, objective, bank, view), capture, partial(_tell_all, notes))
        keeper = Keeper(bank, [StopRule.read(rule) for rule in plan.config.stop_when], best=plan.config.keep == "best")
        steps = _step_loop(plan, objective, bank, gradient, optimizers, reach, keeper, log)
        if keeper.watches:
            keeper.finish(_numbers(plan, objective, bank, view).total, steps)
        before = [] if plan.iterations else _without_steps(plan, objective, bank, view, reach, log, failures)

    with clock.phase("measure"):
        factors = scale_to_strength(plan, bank, view, failures)
        after = _evaluate(plan, objective, bank, view, log)
        effects = measure_effect(bank, view, reach.reached, plan.load)
        tokens = token_shifts(view) if plan.config.report else [[] for _ in requests]
        changes = measured.changes(measured_before)
        probes = _probe(plan, bank, view, reach, measured, measured_before) if plan.config.probe else None
        for own in notes:
            own += measured.notes
        bank.rest()  # whoever saves it must not wait for the next batch's steps
    return Trained(
        plan=plan,
        requests=requests,
        runs=runs,
        bank=bank,
        reach=reach,
        failures=failures,
        steps=log.values,
        taken=steps,
        updates=keeper.updates.tolist(),
        before=before or [own[0] if own else last for own, last in zip(log.values, after, strict=True)],
        after=after,
        effects=effects,
        factors=factors,
        tokens=tokens,
        measured=changes,
        probes=probes,
        notes=notes,
        clock=clock,
    )


def _without_steps(
    plan: Plan, objective: Objective, bank: Bank, view: ModelView, reach: Reach, log: StepLog, failures: Failures
) -> list[Values]:
    """What is done in place of the step loop, where there is none; the objective before it."""
    _gradient(plan, objective, bank, view)
    reach.check(plan)
    before = _evaluate(plan, objective, bank, view, log)
    if plan.closed_form:
        view.begin_evaluation()
        solve(objective.terms[0], view, bank, failures)
    return before


def _optimizers(plan: Plan, bank: Bank) -> list[torch.optim.Optimizer]:
    make = plan.optimizer.build()
    with blaming(f"optimizer {plan.optimizer.name!r}"):
        elementwise = plan.optimizer_spec.elementwise
        optimizers = start_optimizers(make, bank, elementwise=elementwise, iterations=plan.iterations)
    watched = plan.config.keep == "best" or any(not rule.startswith("seconds:") for rule in plan.config.stop_when)
    if watched and any(callable(getattr(optimizer, "eval", None)) for optimizer in optimizers):
        raise UsageError(
            f"optimizer {plan.optimizer.name!r} averages its weights at the end, so that no step's are its result: "
            "leave out --keep best and --stop-when, or take another"
        )
    return optimizers


def _step_loop(
    plan: Plan,
    objective: Objective,
    bank: Bank,
    gradient: Callable[[], StepNumbers],
    optimizers: Sequence[torch.optim.Optimizer],
    reach: Reach,
    keeper: Keeper,
    log: StepLog,
) -> int:
    """Step after step, until the last or until all prompts have stopped; how many there were."""
    step = 0
    while step < plan.iterations and not (step and (log.over or keeper.out_of_time())):
        step += 1
        objective.go_to(step, plan.iterations)
        numbers = gradient()
        training = keeper.see(step, numbers.total)
        if step == 1:
            reach.check(plan)
        bank.attach_gradient()  # not part of what is captured, since it is no work of the device
        with blaming(f"optimizer {plan.optimizer.name!r}"):
            for optimizer in optimizers:
                optimizer.step()
        log.record(numbers, training)
    log.deliver()
    with blaming(f"optimizer {plan.optimizer.name!r}"):
        end_training(optimizers)
    return step


def _probe(
    plan: Plan,
    bank: Bank,
    view: ModelView,
    reach: Reach,
    measured: MeasuredLosses,
    before: Sequence[LossValues],
) -> list[Probe]:
    config = plan.config
    probes = measure_probe(bank, view, reach.reached, config.paraphrases, config.controls, measured.values)
    return [replace(probe, measured_before=own) for probe, own in zip(probes, before, strict=True)]


def _gradient(plan: Plan, objective: Objective, bank: Bank, view: ModelView) -> StepNumbers:
    """Fill the bank's gradient with that of the prompts' *sum*, which does not scale with their number, and of L2."""
    bank.zero_gradient()
    view.begin_step()
    values = objective.values()
    total = objective.trained_total(values)
    if not total.requires_grad:
        raise ObjectiveError(f"the objective ({', '.join(values)}) depends on no trainable layer")
    with blaming("the objective's gradient"):
        backward(total)
    norms = bank.gradient_norms()
    l2 = bank.add_l2(plan.l2)
    return StepNumbers(
        objective.total(values).detach() + l2, {label: value.detach() for label, value in values.items()}, l2, norms
    )


def _tell_all(notes: Sequence[list[str]], note: str) -> None:
    for own in notes:
        own.append(note)


def _capturable(plan: Plan, model: LoadedModel) -> bool:
    """Whether a step may be recorded once and replayed."""
    return model.device.startswith("cuda") and all(term.spec.capturable for term in plan.terms)


def _evaluate(plan: Plan, objective: Objective, bank: Bank, view: ModelView, log: StepLog) -> list[Values]:
    """The objective of the weights as they are now, checked like a step's."""
    return log.read(plan.iterations, _numbers(plan, objective, bank, view))


def _numbers(plan: Plan, objective: Objective, bank: Bank, view: ModelView) -> StepNumbers:
    """The objective of the weights as they are now, on the device."""
    view.begin_evaluation()
    with torch.no_grad(), blaming("the objective"):
        values = objective.values()
        l2 = bank.l2(plan.l2)
        return StepNumbers(objective.total(values) + l2, values, l2, {})


def _cut_texts(view: ModelView) -> list[list[str]]:
    """Per prompt, what of it the model does not read, in words."""
    return [
        [f"the prompt is longer than the model reads; this is cut off: {text!r}" for text in texts]
        for texts in view.cut_texts()
    ]
