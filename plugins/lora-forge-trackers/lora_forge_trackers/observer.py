"""What the trackers share: which of them are active, and which log a run's events belong to."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from lora_forge import hookimpl
from lora_forge.errors import PluginError
from lora_forge.events import RunFailure, RunFinish, RunStart, StepFinish

VARIABLE = "LORA_FORGE_TRACKERS"
# Each is the name of a tracker and of the library it logs through.
TRACKERS = ("tensorboard", "mlflow", "wandb")

_unknown_told: set[str] = set()


class Log(Protocol):
    """The log of one run, open from its start to its finish or failure."""

    def step(self, event: StepFinish) -> None: ...

    def finish(self, event: RunFinish) -> None: ...

    def fail(self, event: RunFailure) -> None: ...


@dataclass
class _Open:
    """An open log, and the last step it has."""

    log: Log
    step: int = 0


Hooks = tuple[
    Callable[[RunStart], None],
    Callable[[StepFinish], None],
    Callable[[RunFinish], None],
    Callable[[RunFailure], None],
]


def hooks(tracker: str, open_log: Callable[[RunStart], Log]) -> Hooks:
    """The four lifecycle hooks of a tracker, in their order: started, step finished, finished, failed.

    What a log raises goes to lora-forge, which warns of it and goes on; that run is not logged any further.
    """
    runs: dict[str, _Open] = {}

    @hookimpl
    def lora_forge_run_started(event: RunStart) -> None:
        # Two runs of one id are the same run: side by side in a batch they share a log.
        if event.run.id not in runs and is_active(tracker):
            runs[event.run.id] = _Open(_open(tracker, open_log, event))
        _tell_unknown()

    @hookimpl
    def lora_forge_step_finished(event: StepFinish) -> None:
        run = runs.get(event.run.id)
        if run and event.step > run.step:
            run.step = event.step
            try:
                run.log.step(event)
            except Exception:
                del runs[event.run.id]
                raise

    @hookimpl
    def lora_forge_run_finished(event: RunFinish) -> None:
        if run := runs.pop(event.run.id, None):
            run.log.finish(event)

    @hookimpl
    def lora_forge_run_failed(event: RunFailure) -> None:
        if run := runs.pop(event.run.id, None):
            run.log.fail(event)

    return lora_forge_run_started, lora_forge_step_finished, lora_forge_run_finished, lora_forge_run_failed


def is_active(tracker: str) -> bool:
    """Whether LORA_FORGE_TRACKERS names it or, where that is not set, its library is installed."""
    named = _named()
    return _is_installed(tracker) if named is None else tracker in named


def _named() -> list[str] | None:
    value = os.environ.get(VARIABLE)
    return None if value is None else [name for part in value.split(",") if (name := part.strip().lower())]


def _is_installed(library: str) -> bool:
    spec = importlib.util.find_spec(library)
    # A folder of that name, such as the one W&B logs to, looks like a package; it has no origin.
    return spec is not None and spec.origin is not None


def _open(tracker: str, open_log: Callable[[RunStart], Log], event: RunStart) -> Log:
    if not _is_installed(tracker):
        remedy = f'pip install "lora-forge-trackers[{tracker}]"'
        raise PluginError(f"{VARIABLE} names {tracker!r}, whose library is not installed: {remedy}")
    return open_log(event)


def _tell_unknown() -> None:
    """Raises PluginError for names that are no tracker's, once in a process each."""
    unknown = [name for name in _named() or () if name not in TRACKERS and name not in _unknown_told]
    _unknown_told.update(unknown)
    if unknown:
        known = ", ".join(sorted(TRACKERS))
        raise PluginError(f"{VARIABLE}: no tracker is named {', '.join(map(repr, unknown))}; known: {known}")
