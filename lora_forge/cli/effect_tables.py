"""`effect` on a terminal. Prompts and names are put there as text, never as markup."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from lora_forge.cli.display import print_warnings
from lora_forge.errors import printable

_LAYERS = 10


def print_effect(report: Mapping[str, Any], *, every_layer: bool) -> None:
    """The tables of what `effect --json` prints."""
    console = Console()
    console.print(
        Text(f"{printable(report['file'])} on {printable(report['base_model'])}", style="bold"), soft_wrap=True
    )
    if report["prompts"]:
        console.print(_prompts(report["prompts"]))
        console.print(_specificity(report["prompts"], report["specificity"]))
        for line in _reasons(report["specificity"]):
            console.print(Text(line), soft_wrap=not console.is_terminal)
    if report["layers"]:
        console.print(_layers(report["layers"], every_layer=every_layer))
    for encoder in dict.fromkeys(token["encoder"] for token in report["tokens"]):
        console.print(_tokens(encoder, [token for token in report["tokens"] if token["encoder"] == encoder]))
    print_warnings(report["notes"])


def _prompts(prompts: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(Column("", no_wrap=True), "prompt", Column("relative shift", no_wrap=True))
    for one in prompts:
        text = one["text"] if one["text_2"] is None else f"{one['text']} / {one['text_2']}"
        cell = Text(printable(text), no_wrap=True, overflow="ellipsis")
        table.add_row(one["role"], cell, _number(one["shifts"][0]["relative"]))
    return table


def _specificity(prompts: Sequence[Mapping[str, Any]], specificity: Sequence[Mapping[str, Any]]) -> Table:
    """The same by part: one row for all together, and one for each."""
    roles = {one["role"]: [other for other in prompts if other["role"] == one["role"]] for one in prompts}
    table = Table(Column("relative shift", overflow="fold"))
    for role in (shown := [role for role in ("training", "paraphrase", "control", "empty") if role in roles]):
        table.add_column(role if role in ("training", "empty") else f"mean of {_several(len(roles[role]), role)}")
    table.add_column("prompt specificity")
    for index, one in enumerate(specificity):
        means = (
            sum(prompt["shifts"][index]["relative"] for prompt in roles[role]) / len(roles[role]) for role in shown
        )
        table.add_row(Text(one["name"]), *map(_number, means), _number(one["ratio"], 3))
        if not index:
            table.add_section()
    return table


def _several(count: int, role: str) -> str:
    return f"{count} {role}{'' if count == 1 else 's'}"


def _reasons(specificity: Iterable[Mapping[str, Any]]) -> list[str]:
    """Why there is no specificity, where there is none."""
    names: dict[str, list[str]] = {}
    for one in specificity:
        if one["reason"]:
            names.setdefault(one["reason"], []).append(one["name"])
    return [f"no prompt specificity of {', '.join(parts)}: {reason}" for reason, parts in names.items()]


def _layers(layers: Sequence[Mapping[str, Any]], *, every_layer: bool) -> Table:
    left = any(one["without"] is not None for one in layers)
    shown = layers if every_layer else sorted(layers, key=lambda one: -one["alone"])[:_LAYERS]
    title = "layers, for the training prompt" + (
        "" if len(shown) == len(layers) else f": {_LAYERS} of {len(layers)} (--layers lists all)"
    )
    table = Table(
        "component", Column("layer", overflow="fold"), "‖ΔW‖", "shift alone", title=title, title_justify="left"
    )
    if left:
        table.add_column("shift without it")
    for one in shown:
        row: list[str | Text] = [
            Text(one["component"]),
            Text(one["layer"]),
            _number(one["delta_norm"]),
            _number(one["alone"]),
        ]
        table.add_row(*row, *([_number(one["without"])] if left else []))
    return table


def _tokens(encoder: str, tokens: Sequence[Mapping[str, Any]]) -> Table:
    """The text token by token, and its padding in one row."""
    parts = list(dict.fromkeys(token["part"] for token in tokens))
    table = Table("", "token", title=f"tokens of {encoder}, for the training prompt", title_justify="left")
    for part in parts:
        table.add_column(Text(part))
        table.add_column("share of its change")
    by_place: dict[int, list[Mapping[str, Any]]] = {}
    for token in tokens:
        by_place.setdefault(token["position"], []).append(token)
    padding = [row for row in by_place.values() if row[0]["padding"]]
    for place, row in by_place.items():
        if not row[0]["padding"]:
            numbers = [text for one in row for text in (_number(one["relative"]), f"{one['share']:.1%}")]
            table.add_row(str(place), Text(printable(row[0]["text"])), *numbers)
    if padding:
        shares = [text for at in range(len(parts)) for text in ("", f"{sum(row[at]['share'] for row in padding):.1%}")]
        table.add_row("", f"padding, {len(padding)} tokens", *shares)
    return table


def _number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}g}"
