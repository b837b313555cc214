"""What people see of a job while it goes on and after it, on stderr: it has no other result than its folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress as RichProgress

from lora_forge.cli.step_bar import step_bar
from lora_forge.events import RunStart, StepFinish
from lora_forge.hookspecs import hookimpl
from lora_forge.jobs.progress import JobState, Line

_SECONDS_BETWEEN_LINES = 10.0


class BatchProgress:
    """Prompts made, rate, time left and failures: a bar on a terminal; elsewhere lines, ten seconds apart at least."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar: RichProgress | None = None
        self._begun: tuple[float, int] | None = None  # when the first prompt started, and what was settled by then
        self._printed = time.monotonic()
        self._batch = ""

    def __enter__(self) -> BatchProgress:
        if self._console.is_terminal:
            self._bar = step_bar(self._console)
            self._bar.start()
            self._task = self._bar.add_task("loading", total=None, values="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def watch(self, state: JobState, lines: Sequence[Line]) -> None:
        """Show the state, and each failure as it happens."""
        if self._begun is None:
            self._begun = (time.monotonic(), state.made + state.failed)
        for line in lines:
            if line["error"]:
                words = f"row {line['row']}: {line['error']}"
                self._console.print(f"[yellow]failed:[/] {escape(words)}", highlight=False, soft_wrap=True)
        self._show(state)

    @hookimpl
    def lora_forge_run_started(self, event: RunStart) -> None:
        self._batch = event.run.batch_id

    @hookimpl
    def lora_forge_step_finished(self, event: StepFinish) -> None:
        if self._bar is not None and event.run.batch_id == self._batch:
            self._bar.update(self._task, description=f"step {event.step}/{event.run.iterations}")

    def _show(self, state: JobState) -> None:
        values = f"{state.failed} failed" if state.failed else ""
        values += self._pace(state)
        if self._bar is not None:
            self._bar.update(self._task, completed=state.made + state.failed, total=state.prompts, values=values)
            if not self._batch and self._settled_now(state):  # by a process whose steps are not heard here
                self._bar.update(self._task, description="training")
        elif time.monotonic() - self._printed >= _SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            self._console.print(f"{state.made}/{state.prompts} made  {values}", highlight=False, soft_wrap=True)

    def _settled_now(self, state: JobState) -> int:
        assert self._begun is not None
        return state.made + state.failed - self._begun[1]

    def _pace(self, state: JobState) -> str:
        assert self._begun is not None
        done, seconds = self._settled_now(state), time.monotonic() - self._begun[0]
        if not done or not seconds:
            return ""
        return f"  {60 * done / seconds:.3g} prompts/min  {_duration(state.left * seconds / done)} left"


def print_state(state: JobState, output_dir: str) -> None:
    """The end of a job, in a line."""
    console = Console(stderr=True)
    now = state.made - state.earlier
    parts = [f"{now} made now, {state.earlier} before" if state.earlier else f"{now} made"]
    if state.failed:
        parts.append(f"[yellow]{state.failed} failed[/], manifest.jsonl says why")
    if state.twice:
        parts.append(f"{state.twice} {'row repeats' if state.twice == 1 else 'rows repeat'} another")
    if state.halved:
        parts.append("memory ran out, so that batches were halved")
    console.print(f"{escape(output_dir)}: {'; '.join(parts)}", highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
