"""A comparison, top to bottom: objectives, a job for each of them, results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from lora_forge.comparison.gathering import Made, compared, gathered, read_made
from lora_forge.comparison.objectives import ComparedObjective, read_objectives
from lora_forge.comparison.peak_memory import PeakMemory, keep_peak, kept_peak
from lora_forge.comparison.results import NAME, Header, Results, read_results, write_results
from lora_forge.config.run import collect_run_config
from lora_forge.errors import ObjectiveError, PluginError, UsageError
from lora_forge.jobs.job import Job, run_job
from lora_forge.jobs.overrides import NONE
from lora_forge.jobs.progress import Watch
from lora_forge.jobs.rows import Row
from lora_forge.jobs.tasks import Plans
from lora_forge.output import place_of
from lora_forge.plan import Plan, portable
from lora_forge.plugins import Registry
from lora_forge.saving import versions

PARAPHRASES = ("a picture of {prompt}", "{prompt}, as a picture", "an image that shows {prompt}", "this is {prompt}")
UNLIMITED = 100_000  # iterations, where seconds are the budget
_TOLD_APART = ("prompt", "prompt_2", "model", "base_model", "iterations", "seed", "loss", "stop_when")

WatchObjective = Callable[[str], AbstractContextManager[Watch]]  # of the objective of this name, while it is trained


@dataclass(frozen=True)
class Comparison:
    """What was asked for.

    layers: the run config's that all objectives share, as `collect_run_config` takes them. objectives: expressions.
    seconds: of training for each LoRA, beside or instead of iterations, which the layers have. paraphrases: texts with
    `{prompt}`. controls: prompts that have nothing to do with those trained. output_dir: a path or a URL.
    batch_size, threads, retry_failed: as a job's.
    """

    layers: tuple[Mapping[str, Any], ...]
    objectives: tuple[str, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    output_dir: str
    seconds: float | None = None
    paraphrases: tuple[str, ...] = PARAPHRASES
    controls: tuple[str, ...] = ()
    batch_size: int | None = None
    threads: int | None = None
    retry_failed: bool = False


def compare(asked: Comparison, registry: Registry, watch: WatchObjective) -> Results:
    """Make every objective's LoRA of every prompt and seed, what is made already aside, and write the results.

    Raises UsageError (and its kinds) for what is wrong with the whole comparison, before anything is made where that
    can be known. What ends a LoRA costs that LoRA, and is told in its row.
    """
    _check(asked)
    objectives, measured = read_objectives(asked.objectives, registry)
    jobs = [_job(asked, one, measured) for one in objectives]
    plans = [_plan(asked, job, registry) for job in jobs]
    _check_folder(asked, objectives)
    for one, plan in zip(objectives, plans, strict=True):
        _check_schedules(one, plan)
    made = [_carry_out(one, job, registry, watch) for one, job in zip(objectives, jobs, strict=True)]
    trained = next((plan for plan in plans if not plan.closed_form), plans[0])  # one that is solved takes no steps
    results = Results(_header(asked, trained, made), gathered(made, asked.prompts, asked.seeds))
    write_results(place_of(asked.output_dir) / NAME, results)
    return results


def shared_plan(asked: Comparison, registry: Registry) -> Plan:
    """The first objective's plan, for all that its plan shares with the others'."""
    objectives, measured = read_objectives(asked.objectives, registry)
    return _plan(asked, _job(asked, objectives[0], measured), registry)


def _plan(asked: Comparison, job: Job, registry: Registry) -> Plan:
    return Plans(job.layers, registry).of({}, asked.prompts[0], None)


def _check(asked: Comparison) -> None:
    for what, some in (("objective", asked.objectives), ("prompt", asked.prompts), ("seed", asked.seeds)):
        if not some:
            raise UsageError(f"there is no {what} to compare by")
        twice = next((one for one in some if some.count(one) > 1), None)
        if twice is not None:
            raise UsageError(f"the {what} {twice!r} is given twice")
    plain = next((text for text in asked.paraphrases if "{prompt}" not in text), None)
    if plain is not None:
        raise UsageError(f"the paraphrase {plain!r} has no {{prompt}} in it, and so is the same for all prompts")


def _check_folder(asked: Comparison, objectives: Sequence[ComparedObjective]) -> None:
    """Raises UsageError where the folder has results of other objectives, which would be lost."""
    try:
        there = {one.name for one in read_results(asked.output_dir).header.objectives}
    except UsageError:  # none yet, or none that can be read
        return
    names = {one.name for one in objectives}
    if there != names:
        several = ", ".join(sorted(there ^ names))
        raise UsageError(
            f"{asked.output_dir!r} holds a comparison of other objectives (the difference: {several}); every LoRA is "
            "measured by all of them, so give the same ones, or another --output-dir"
        )


def _check_schedules(objective: ComparedObjective, plan: Plan) -> None:
    """Raises UsageError for a schedule over all steps where nobody knows how many there will be."""
    if plan.iterations != UNLIMITED:
        return
    whole = [term.label for term in plan.terms if term.schedule.kind != "constant" and term.schedule.last is None]
    if getattr(plan.optimizer.options, "schedule", "constant") != "constant":
        whole.append(f"optimizer {plan.optimizer.name}")
    if whole:
        raise UsageError(
            f"{objective.name}: the schedule of {', '.join(whole)} goes over all steps, and seconds do not say how "
            "many there are: give its steps, such as linear:1-30, or the iterations too"
        )


def _job(asked: Comparison, objective: ComparedObjective, measured: Sequence[Mapping[str, Any]]) -> Job:
    own: dict[str, Any] = {
        "loss": objective.loss,
        "measure": measured,
        "probe": True,
        "paraphrases": asked.paraphrases,
        "controls": asked.controls,
    }
    if asked.seconds is not None:
        shared, _ = collect_run_config(asked.layers)
        own["stop_when"] = (*shared.stop_when, f"seconds:{asked.seconds!r}")
        own["iterations"] = UNLIMITED if shared.iterations is None else shared.iterations
    pairs = [(prompt, seed) for prompt in asked.prompts for seed in asked.seeds]
    return Job(
        layers=(*asked.layers, own),
        rows=[Row(number, prompt, None, seed, None, NONE, None) for number, (prompt, seed) in enumerate(pairs, 1)],
        output_dir=str(place_of(asked.output_dir) / objective.folder),
        batch_size=asked.batch_size,
        threads=asked.threads,
        retry_failed=asked.retry_failed,
    )


def _carry_out(objective: ComparedObjective, job: Job, registry: Registry, watch: WatchObjective) -> Made:
    """Make what is missing of one objective. What ends all of its LoRAs, and is its own fault, ends no other's."""
    from lora_forge.model import resolve_device

    folder, failure = place_of(job.output_dir), ""
    config, _ = collect_run_config(job.layers)
    memory = PeakMemory(resolve_device(config.device))
    try:
        with watch(objective.name) as told:
            state = run_job(job, registry, told)
        if state.made > state.earlier:
            keep_peak(folder, memory.read())
    except (ObjectiveError, PluginError) as error:
        failure = str(error)
    return read_made(folder, objective, peak_memory=kept_peak(folder), failure=failure)


def _header(asked: Comparison, plan: Plan, made: Sequence[Made]) -> Header:
    begun = [one.header for one in made if one.header is not None]
    settings = {key: value for key, value in plan.record().items() if key not in _TOLD_APART}
    limited = asked.seconds is None or plan.iterations != UNLIMITED
    return Header(
        model=plan.model.name,
        base_model=portable(plan.base_model),
        objectives=tuple(compared(one) for one in made),
        prompts=len(asked.prompts),
        seeds=asked.seeds,
        iterations=plan.iterations if limited else None,
        seconds=asked.seconds,
        controls=asked.controls,
        paraphrases=asked.paraphrases,
        versions=begun[0]["versions"] if begun else versions(),
        threads=begun[0]["threads"] if begun else 0,
        settings={**settings, "batch_sizes": [header["batch_size"] for header in begun]},
    )
