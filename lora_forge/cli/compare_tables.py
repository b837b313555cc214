"""`compare` on a terminal: a row for each objective, and what the numbers come to in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from lora_forge.comparison.results import Header
from lora_forge.comparison.statistics import Interval
from lora_forge.comparison.summary import OWN, ObjectiveSummary, Summary
from lora_forge.comparison.verdicts import verdicts
from lora_forge.errors import printable

Cell = Callable[[ObjectiveSummary], str]


def print_comparison(header: Header, summary: Summary) -> None:
    """Means over prompts, each with half of its 95 % interval. Names are put there as text, never as markup."""
    console = Console()
    lot = f"{_several(header.prompts, 'prompt')} × {_several(len(header.seeds), 'seed')}"
    title = f"{_several(len(header.objectives), 'objective')} on {printable(header.model)}, {lot} each"
    console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(_table(summary, _DONE))
    console.print(_table(summary, _TAKEN))
    for line in verdicts(summary):
        console.print(Text(line), soft_wrap=not console.is_terminal)


def _measure(name: str, *, signed: bool = False) -> Cell:
    return lambda one: _mean(one.measures[name], signed=signed)


def _milliseconds(one: ObjectiveSummary) -> str:
    """Without an interval: LoRAs of one batch share its time, so that they say nothing of how it varies."""
    interval = one.measures["seconds_per_step"]
    return "–" if interval is None else f"{1000 * interval.mean:.3g}"


def _memory(one: ObjectiveSummary) -> str:
    return "–" if one.peak_memory is None else f"{one.peak_memory / 10**6:.0f}"


def _loras(one: ObjectiveSummary) -> str:
    return f"{one.runs}, {one.failed} failed" if one.failed else str(one.runs)


_DONE: Mapping[str, Cell] = {
    "change of its own value": _measure(OWN, signed=True),
    "conditioning shift": _measure("conditioning_shift"),
    "prompt specificity": _measure("specificity"),
}
_TAKEN: Mapping[str, Cell] = {
    "LoRAs": _loras,
    "‖ΔW‖": _measure("delta_norm"),
    "effective rank": _measure("effective_rank"),
    "ms per step": _milliseconds,
    "MB": _memory,
}


def _table(summary: Summary, cells: Mapping[str, Cell]) -> Table:
    table = Table(Column("objective", overflow="fold"), *(Column(name, justify="right") for name in cells))
    for one in summary.objectives:
        table.add_row(Text(printable(one.name)), *(cell(one) for cell in cells.values()))
    return table


def _mean(interval: Interval | None, *, signed: bool) -> str:
    if interval is None:
        return "–"
    mean = f"{interval.mean:{'+' if signed else ''}.3g}"
    return mean if interval.high is None else f"{mean} ± {interval.high - interval.mean:.1g}"


def _several(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
