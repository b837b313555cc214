"""The worker: loads the model once, trains batches one after another, and writes what they made."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_forge.errors import OutputError, UsageError
from lora_forge.jobs.tasks import Entry, JobSettings, Plans, Task, reason, requests_of
from lora_forge.output import place_of
from lora_forge.plugins import Registry, discover

if TYPE_CHECKING:
    from lora_forge.events import RunInfo
    from lora_forge.model import LoadedModel
    from lora_forge.plan import Plan
    from lora_forge.result import RunResult
    from lora_forge.training.train import Trained


@dataclass(frozen=True)
class Outcome:
    """What became of a task: lines for the manifest, of the prompts that were wanted. halved: memory had run out."""

    number: int
    lines: tuple[dict[str, Any], ...]
    halved: bool


@dataclass(frozen=True)
class Part:
    """Prompts of a task that were trained side by side; `error` if they could not be."""

    entries: Sequence[Entry]
    runs: Sequence[RunInfo]
    seconds: float
    trained: Trained | None = None
    error: Exception | None = None


class Worker:
    """A job's `lora_forge.contracts.Worker`: of tasks, parts that were trained, and outcomes."""

    def __init__(self, settings: JobSettings, registry: Registry | None = None) -> None:
        self._settings = settings
        self._registry = registry or _discover(settings)
        self._plans = Plans(settings.layers, self._registry)
        self._folder = place_of(settings.output_dir)
        self._model: LoadedModel | None = None
        self._most = settings.most  # prompts that train at once; fewer once memory has run out
        self._halved = False
        hooks = [hook for _, hooks in self._registry.observers() for hook in hooks]
        self._observed = bool({"lora_forge_run_finished", "lora_forge_run_failed"} & set(hooks))
        self._finished: deque[RunResult | tuple[RunInfo, Exception]] = deque()
        self._told: set[str] = set()

    def model_for(self, plan: Plan) -> LoadedModel:
        """The base model, opened for the first plan and checked against each."""
        import torch

        from lora_forge.model import open_model

        torch.set_num_threads(self._settings.threads)
        if self._model is None:
            self._model = open_model(plan)
        else:
            self._model.check(plan)
        return self._model

    def plan_of(self, task: Task) -> Plan:
        """The plan that a task's prompts share."""
        return self._plans.of(task.overrides, task.entries[0].prompt, task.entries[0].prompt_2)

    def train(self, task: Task) -> tuple[Task, list[Part]]:
        """Raises UsageError for what is wrong with all prompts of the job."""
        self._announce()
        parts = list(self._train(self.plan_of(task), task.entries))
        for part in parts:
            if isinstance(part.error, UsageError) and not task.overrides:
                raise part.error
        return task, parts

    def _train(self, plan: Plan, entries: Sequence[Entry]) -> Iterator[Part]:
        """Train all together, or, when that fails, in halves: down to the prompt that is to blame."""
        from lora_forge.jobs.memory import out_of_memory, release_memory

        size = len(entries)
        if self._most and size > self._most:
            yield from self._halves(plan, entries)
            return
        part = self._together(plan, entries)
        if part.trained:
            yield part
            for index, entry in enumerate(entries):
                if size > 1 and entry.wanted and part.trained.failures[index]:
                    yield from self._train(plan, [entry])  # a loss may spread what is not finite over the batch
        elif size > 1 and out_of_memory(part.error):
            self._most, self._halved = size // 2, True
            release_memory()
            yield from self._halves(plan, entries)
        elif size == 1 or isinstance(part.error, UsageError):  # what was asked for is to blame, and no one prompt
            yield part
        else:
            yield from self._halves(plan, entries)

    def _together(self, plan: Plan, entries: Sequence[Entry]) -> Part:
        from lora_forge.clock import Clock
        from lora_forge.runner import announce_failure, run_infos
        from lora_forge.training.train import train

        requests = requests_of(plan, self._folder, entries)
        runs = run_infos(plan, requests)
        known = [index for index, entry in enumerate(entries) if not entry.wanted]
        start = time.perf_counter()
        try:
            trained = train(plan, requests, runs, self.model_for(plan), self._registry, Clock(), unheard=known)
        except Exception as error:  # whatever it was, the job goes on without the prompts it is about
            _forget_frames(error)
            return Part(entries, runs, time.perf_counter() - start, error=error)
        except BaseException as error:
            for index, run in enumerate(runs):
                if index not in known:
                    announce_failure(self._registry, run, error)
            raise
        return Part(entries, runs, time.perf_counter() - start, trained)

    def _halves(self, plan: Plan, entries: Sequence[Entry]) -> Iterator[Part]:
        middle = (len(entries) + 1) // 2
        yield from self._train(plan, entries[:middle])
        yield from self._train(plan, entries[middle:])

    def save(self, trained: tuple[Task, list[Part]]) -> Outcome:
        task, parts = trained
        lines = [line for part in parts for line in self._save(task, part)]
        return Outcome(task.number, tuple(lines), self._halved and (self._most or 0) < len(task.entries))

    def _save(self, task: Task, part: Part) -> Iterator[dict[str, Any]]:
        from lora_forge.finishing import finish

        for index, entry in enumerate(part.entries):
            if not entry.wanted:
                continue
            error: Exception | None = part.error
            result = None
            if part.trained:
                error = part.trained.failures[index]
                if error and len(part.entries) > 1:  # tried again alone
                    continue
            start = time.perf_counter()
            if part.trained and not error:
                assert self._model is not None
                try:
                    (result,) = finish(part.trained, [index], self._model)
                except OutputError:  # the disk's, or the store's: the next prompt would fare no better
                    raise
                except Exception as failure:
                    error = failure
            seconds = part.seconds / len(part.entries) + time.perf_counter() - start
            run = part.runs[index]
            ended = (run, error) if error else result
            if ended and self._observed:
                self._finished.append(ended)
            yield _line(task, entry, run, len(part.entries), seconds, result, error)

    def close(self) -> None:
        self._announce()
        if self._model is not None:
            self._model.close()
            self._model = None

    def _announce(self) -> None:
        """Tell observers how runs ended that were saved meanwhile, on the thread on which they heard of the rest."""
        from lora_forge.runner import announce_failure, announce_result

        while self._finished:
            one = self._finished.popleft()
            if isinstance(one, tuple):
                self._tell(announce_failure(self._registry, *one))
            else:
                self._tell(announce_result(self._registry, one).warnings[len(one.warnings) :])

    def _tell(self, notes: Sequence[str]) -> None:
        """What went wrong in observers, once each: the manifest has the prompt's line already."""
        for note in notes:
            if note not in self._told:
                self._told.add(note)
                print(f"lora-forge: warning: {note}", file=sys.stderr)


def _discover(settings: JobSettings) -> Registry:
    from lora_forge.config.run import collect_run_config

    config, _ = collect_run_config(settings.layers)
    return discover(config.plugins, strict=config.strict_plugins)


def _line(
    task: Task,
    entry: Entry,
    run: RunInfo,
    batch_size: int,
    seconds: float,
    result: RunResult | None,
    error: Exception | None,
) -> dict[str, Any]:
    line: dict[str, Any] = {"id": entry.stem, "row": entry.row, "prompt": entry.prompt}
    if entry.prompt_2 is not None:
        line["prompt_2"] = entry.prompt_2
    line["seed"] = entry.seed
    if task.overrides:
        line["overrides"] = dict(task.overrides)
    line |= {"run_id": run.id, "batch": {"number": task.number, "id": run.batch_id, "size": batch_size}}
    if result is not None:
        line |= {
            "path": result.path.name if result.path else None,
            "files": [place.name for place in result.files],
            "before": result.before.as_dict(),
            "after": result.after.as_dict(),
            "strength": result.strength,
            "effect": result.effect.as_dict(),
            **_measured(result, batch_size),
            "warnings": list(result.warnings),
        }
    return {**line, "seconds": round(seconds, 3), "error": reason(error) if error else None}


def _measured(result: RunResult, batch_size: int) -> dict[str, Any]:
    """What is in a line only where it was asked for. seconds_per_step: a prompt's share of its batch's."""
    line: dict[str, Any] = {}
    if result.updates != result.run.iterations:
        line["updates"] = result.updates
    if result.measured:
        line["measured"] = {label: list(pair) for label, pair in result.measured.items()}
    if result.probe:
        line |= {"probe": result.probe.as_dict(), "steps": [values.loss for values in result.steps]}
        per_step = result.seconds_per_step
        line["seconds_per_step"] = None if per_step is None else per_step / batch_size
        line["inert"] = list(result.inert)
    return line


def _forget_frames(error: BaseException | None) -> None:
    """Let go of what the frames hold that an error, and its causes, went through: a batch's memory."""
    while error is not None:
        error.__traceback__ = None
        if error.__context__ is not error.__cause__:
            _forget_frames(error.__context__)
        error = error.__cause__
