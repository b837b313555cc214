"""What people see while a run goes on and after it. Progress and warnings go to stderr, results to stdout."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress as RichProgress
from rich.progress import TimeRemainingColumn
from rich.table import Column, Table

from lora_forge.cli.step_bar import step_bar
from lora_forge.events import RunStart, StepFinish
from lora_forge.files.names import RECORD_KEY
from lora_forge.hookspecs import hookimpl
from lora_forge.result import RunResult

_PLAIN_LINES = 10


class Progress:
    """Shows steps as they finish: a bar on a terminal, at most ten plain lines elsewhere."""

    def __init__(self, iterations: int) -> None:
        self._iterations = iterations
        self._console = Console(stderr=True)
        self._started = time.perf_counter()
        self._bar: RichProgress | None = None

    def __enter__(self) -> Progress:
        if self._console.is_terminal and self._iterations:
            self._bar = step_bar(self._console, TimeRemainingColumn())
            self._bar.start()
            self._task = self._bar.add_task("loading", total=self._iterations, values="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @hookimpl
    def lora_forge_run_started(self, event: RunStart) -> None:
        self._started = time.perf_counter()

    @hookimpl
    def lora_forge_step_finished(self, event: StepFinish) -> None:
        rate = event.step / max(time.perf_counter() - self._started, 1e-9)
        values = f"loss {event.loss:.6g}  {rate:.3g} steps/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=event.step, values=values, description="forging")
            return
        every = max(1, -(-self._iterations // _PLAIN_LINES))
        if event.step % every == 0 or event.step == self._iterations:
            left = (self._iterations - event.step) / rate
            self._console.print(
                f"step {event.step}/{self._iterations}  {values}  {left:.0f} s left", highlight=False, soft_wrap=True
            )


def print_warnings(warnings: Iterable[str]) -> None:
    """Warnings, one line each, on stderr."""
    console = Console(stderr=True)
    for warning in warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=not console.is_terminal)


def print_result(result: RunResult) -> None:
    """The table of a finished run, then the path and the lines of Python that use the file."""
    console = Console()
    console.print(_loss_table(result))
    console.print(_layer_table(result))
    if result.effect.shifts:
        console.print(_shift_table(result))
    if result.updates != result.run.iterations:
        stopped = f"; stopped after {len(result.steps)}" if len(result.steps) < result.run.iterations else ""
        kept = f"kept: the weights after {result.updates} of {result.run.iterations} steps{stopped}"
        console.print(kept, highlight=False)
    if result.strength != 1:
        console.print(f"scaled by {result.strength:.6g}", highlight=False)
    if result.dropped:
        console.print(f"{len(result.dropped)} inert layers left out of the file", highlight=False)
    if result.padded:
        console.print(f"{len(result.padded)} layers of zeros added, as the format demands", highlight=False)
    if result.rounding:
        words = f"rounded to {json.loads(result.metadata[RECORD_KEY])['run']['dtype_out']}"
        console.print(f"{words}: ΔW of a layer is off by up to {result.rounding:.2g} of its norm", highlight=False)
    console.print()
    for place in result.files:
        console.print(f"[bold]{escape(str(place))}[/]", highlight=False, soft_wrap=True)
    if not result.usage:
        return
    console.print("\nuse it:", highlight=False)
    console.print(result.usage, markup=False, highlight=False, soft_wrap=True)


def print_plan(record: dict[str, Any]) -> None:
    """A resolved run, one row a key."""
    table = Table("key", "value", title="the run, resolved", title_justify="left")
    table.columns[1].overflow = "fold"
    for key, value in record.items():
        table.add_row(key, escape(_cell(value)))
    Console().print(table)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(_cell(item) for item in value)
    if isinstance(value, dict) and "name" in value:
        options = ", ".join(f"{name}={option}" for name, option in value["options"].items())
        weight = f"{value['weight']:g} × " if "weight" in value else ""
        schedule = f" @ {value['schedule']}" if "schedule" in value else ""
        return f"{weight}{value['name']}({options}){schedule}  [{value['distribution']} {value['version']}]"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {item}" for name, item in value.items())
    return "" if value is None else str(value)


def _loss_table(result: RunResult) -> Table:
    table = Table("", "before", "after", title="objective", title_justify="left")
    for label in result.after.terms:
        table.add_row(label, f"{result.before.terms[label]:.6g}", f"{result.after.terms[label]:.6g}")
    table.add_row("L2", f"{result.before.l2:.6g}", f"{result.after.l2:.6g}")
    table.add_row("[bold]total[/]", f"[bold]{result.before.loss:.6g}[/]", f"[bold]{result.after.loss:.6g}[/]")
    for label, (before, after) in result.measured.items():
        values = ("–" if value is None else f"{value:.6g}" for value in (before, after))
        table.add_row(f"[dim]measured:[/] {escape(label)}", *values)
    return table


def _layer_table(result: RunResult) -> Table:
    table = Table(
        "component",
        "layers",
        "inert",
        "‖ΔW‖",
        Column("largest ‖ΔW‖/‖W‖", overflow="fold"),
        title="layers",
        title_justify="left",
    )
    for one in result.effect.components:
        largest = "frozen weights not loaded"
        if one.largest_relative_change is not None:
            largest = f"{one.largest_relative_change:.3g}" + (f"  {one.largest_layer}" if one.largest_layer else "")
        table.add_row(one.component, str(one.layers), str(one.inert or "–"), f"{one.delta_norm:.4g}", largest)
    return table


def _shift_table(result: RunResult) -> Table:
    table = Table("", "relative shift", "cosine", title="conditioning", title_justify="left")
    for shift in result.effect.shifts:
        table.add_row(shift.name, f"{shift.relative:.4g}", f"{shift.cosine:.6f}")
    return table
