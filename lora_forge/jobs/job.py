"""A job, top to bottom: rows, names, what is settled already, batches, an executor, the manifest."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lora_forge.choices import Chosen, choose
from lora_forge.config.run import Choice
from lora_forge.contracts import ExecutorRequest
from lora_forge.errors import ConfigError, Problem, UsageError, blaming
from lora_forge.jobs.folder import check_strangers, entries_of, names_in, settled_in, sweep
from lora_forge.jobs.manifest import Manifest
from lora_forge.jobs.progress import JobState, Reporter, Watch
from lora_forge.jobs.rows import Row
from lora_forge.jobs.tasks import Entry, JobSettings, Plans, Prepared, compose, output_of, prepare
from lora_forge.jobs.worker import Worker
from lora_forge.like import record_differences
from lora_forge.output import Place, place_of
from lora_forge.plan import Plan, Request
from lora_forge.plugins import Registry
from lora_forge.records import ExecutorSpec
from lora_forge.saving import check_saving, versions

if TYPE_CHECKING:
    from lora_forge.model import LoadedModel

ELSEWHERE = 16  # prompts in a batch on machines whose memory is not known here; workers halve it where it runs out


@dataclass(frozen=True)
class Job:
    """What was asked for.

    layers: the run config's, as `collect_run_config` takes them. output_dir: a path or a URL.
    batch_size: prompts side by side, None for as many as pay and fit. threads: torch's CPU threads in a worker, None
    for torch's own choice. retry_failed: prompts that failed before are tried again. overwrite: files in the folder
    that no manifest knows may be replaced.
    """

    layers: tuple[Mapping[str, Any], ...]
    rows: Sequence[Row]
    output_dir: str
    batch_size: int | None = None
    threads: int | None = None
    executor: Choice = Choice("local")
    retry_failed: bool = False
    overwrite: bool = False


def run_job(job: Job, registry: Registry, watch: Watch) -> JobState:
    """Make a LoRA for each row, in batches, and write the manifest; what is made already is not made again.

    Raises UsageError (and its kinds) for what is wrong with the whole job. What is wrong with a row costs that row.
    """
    if not job.output_dir:
        raise UsageError("the folder to write to has no name")
    folder, executor = place_of(job.output_dir), _executor(registry, job.executor)
    plans = Plans(job.layers, registry)
    prepared = prepare(job.rows, plans)
    plan = _shared_plan(prepared, plans, folder)

    with closing(Manifest.open(folder)) as manifest:
        present = names_in(folder)
        made, failed = settled_in(manifest.rows, present, prepared)
        failed = set() if job.retry_failed else failed
        if not job.overwrite:
            check_strangers(folder, present, prepared, plan, manifest.rows)
        begun = manifest.header is not None
        start = _start(job, manifest, plan, prepared, executor, registry)
        if begun:
            sweep(folder, present, prepared, plan)

        reporter = Reporter(manifest, watch, prepared, made, failed, start.batch_size)
        tasks = compose(prepared, start.batch_size, made | failed)
        if tasks:
            carry_out = executor.build()
            with blaming(f"executor {executor.name!r}"):
                carry_out(ExecutorRequest(start.make_worker, tasks, reporter.report, start.threads))
        return reporter.state


def _executor(registry: Registry, choice: Choice) -> Chosen:
    problems: list[Problem] = []
    chosen = choose(registry, "executor", choice, problems)
    if chosen is None:
        raise ConfigError("", problems)
    return chosen


def _shared_plan(prepared: Prepared, plans: Plans, folder: Place) -> Plan:
    """The plan that prompts without overrides have. Raises UsageError for what would be wrong with every row."""
    first = next(entries_of(prepared), None)
    if first is None:
        if not prepared.refused:
            raise UsageError("there is no prompt")
        row, why = prepared.refused[0]
        plans.of({}, "any prompt", None)  # a mistake in what all rows share comes first
        raise UsageError(f"no row can be used; row {row.number}: {why}")
    plan = plans.of({}, first.prompt, None)
    if plan.config.preview:
        raise UsageError("a batch makes no previews; lora-forge preview makes one of any file")
    check_saving(replace(plan, config=replace(plan.config, output=str(output_of(plan, folder, first.stem)))))
    return plan


@dataclass(frozen=True)
class _Start:
    make_worker: Callable[[], Worker]
    batch_size: int
    threads: int


def _start(
    job: Job, manifest: Manifest, plan: Plan, prepared: Prepared, executor: Chosen, registry: Registry
) -> _Start:
    """Batch size and threads: those the job was begun with, or, of a new one, those asked for or chosen now.

    Raises UsageError if the manifest is another job's.
    """
    record = _record(plan)
    if manifest.header is not None:
        _check_same(job, manifest.header, record)
    threads = _kept(manifest, "threads") or job.threads or _usual_threads()
    batch_size = _kept(manifest, "batch_size") or job.batch_size
    folder = place_of(job.output_dir)  # a worker's process may be in another folder, even on this machine
    output_dir = str(folder.absolute()) if isinstance(folder, Path) else job.output_dir
    settings = JobSettings(job.layers, output_dir, threads, job.batch_size)
    make_worker: Callable[[], Worker] = functools.partial(Worker, settings)
    if cast(ExecutorSpec, executor.supplied.spec).local:
        worker = Worker(settings, registry)
        make_worker = lambda: worker  # noqa: E731
        model = worker.model_for(plan)  # what is wrong with it is told before the first prompt
        batch_size = batch_size or _measured(plan, next(entries_of(prepared)), model)
    batch_size = batch_size or ELSEWHERE
    if manifest.header is None:
        manifest.begin({**record, "batch_size": batch_size, "threads": threads})
    return _Start(make_worker, batch_size, threads)


def _measured(plan: Plan, entry: Entry, model: LoadedModel) -> int:
    from lora_forge.jobs.batch_size import batch_size_for
    from lora_forge.jobs.memory import out_of_memory

    try:
        return batch_size_for(plan, Request(entry.prompt, None, entry.seed, None), model)
    except UsageError:  # of every prompt
        raise
    except Exception as error:  # of this one, perhaps; it is told where its turn comes
        return 1 if out_of_memory(error) else ELSEWHERE


def _kept(manifest: Manifest, key: str) -> int | None:
    return None if manifest.header is None else int(manifest.header[key])


def _usual_threads() -> int:
    import torch

    return torch.get_num_threads()


def _record(plan: Plan) -> dict[str, Any]:
    """What all files of a job have in common: for the manifest, and to know the job by."""
    config = plan.config
    shared = {key: value for key, value in plan.record().items() if key not in ("prompt", "prompt_2")}
    written: dict[str, Any] = {
        "sidecar": config.sidecar,
        "report": config.report,
        "date": config.date,
        "device": config.device,
    }
    if plan.measured:
        written["measure"] = [term.record() for term in plan.measured]
    if config.probe:
        written |= {"paraphrases": list(config.paraphrases), "controls": list(config.controls)}
    return {"run": {**shared, **written}, "versions": versions()}


def _check_same(job: Job, header: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    found = [one for key in ("run", "versions") for one in record_differences("", header.get(key), record[key])]
    if job.batch_size and job.batch_size > int(header["batch_size"]):  # fewer at once are the same batches, in parts
        found.append(f"batch_size was {header['batch_size']}, now {job.batch_size}")
    if job.threads and job.threads != int(header["threads"]):
        found.append(f"threads was {header['threads']}, now {job.threads}")
    if found:
        raise UsageError(
            f"{job.output_dir!r} holds another job ({'; '.join(found[:5])}); "
            "go on with its settings, or give another --output-dir"
        )
