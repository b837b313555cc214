"""`preview` on a terminal. Prompts and names are put there as text, never as markup."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from lora_forge.cli.display import print_warnings
from lora_forge.errors import printable


def print_preview(report: Mapping[str, Any]) -> None:
    """The table of what `preview --json` prints."""
    console = Console()
    heading = f"{printable(report['file'])} on {printable(report['base_model'])}"
    console.print(Text(heading, style="bold"), soft_wrap=True)
    console.print(_differences(report))
    print_warnings(report["notes"])


def _differences(report: Mapping[str, Any]) -> Table:
    """A row for each prompt and seed, then the means."""
    strengths = report["strengths"][1:]
    table = Table(
        Column("", no_wrap=True),
        "prompt",
        Column("seed", no_wrap=True),
        *(Column(f"at {strength:g}", no_wrap=True) for strength in strengths),
        title="mean difference from the image without, in % of the range",
        title_justify="left",
    )
    rows: dict[tuple[Any, ...], list[str]] = {}
    for one in report["images"]:
        row = rows.setdefault((one["role"], one["text"], one["text_2"], one["seed"]), [])
        if one["strength"]:
            row.append(_number(one["difference"]))
    for (role, text, text_2, seed), row in rows.items():
        whole = text if text_2 is None else f"{text} / {text_2}"
        table.add_row(role, Text(printable(whole), no_wrap=True, overflow="ellipsis"), str(seed), *row)
    table.add_section()
    means = report["differences"]
    table.add_row("training", "mean", "", *(_number(one["training"]) for one in means))
    if any(one["controls"] is not None for one in means):
        table.add_row("control", "mean", "", *(_number(one["controls"]) for one in means))
        table.add_row("", "training / control", "", *(_number(one["ratio"]) for one in means))
    return table


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
