"""The bar of whatever goes on for long, on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn


def step_bar(console: Console, *columns: ProgressColumn) -> Progress:
    """What is being done, a bar, how much of it, and the task's field `values`; then other columns."""
    return Progress(
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[values]}"),
        *columns,
        console=console,
        transient=True,
    )
