"""`lora-forge plugins show NAME`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from lora_forge.cli.answer import json_alone
from lora_forge.cli.plugins.options import json_option, kind_option, plugin_files, strict_option
from lora_forge.cli.registry import open_registry
from lora_forge.options import describe_options
from lora_forge.plugins import Supplied
from lora_forge.records import BackendSpec, LossSpec, OptimizerSpec, SaverSpec
from lora_forge.schema import options_schema


@click.command(name="show")
@click.argument("name")
@kind_option
@plugin_files
@strict_option
@json_option
def command(name: str, kind: str | None, files: tuple[Path, ...], strict: bool, as_json: bool) -> None:
    """Show one plugin's options, what it needs, and where it comes from."""
    with json_alone(as_json) as answer:
        registry = open_registry(files, strict=strict)
    records = [_record(one) for one in registry.find(name, kind)]
    if as_json:
        answer(records if len(records) > 1 else records[0])
        return
    for record in records:
        _print_record(record)


def _record(one: Supplied) -> dict[str, Any]:
    spec = one.spec
    record: dict[str, Any] = {**one.provenance(), "summary": spec.summary}
    if isinstance(spec, LossSpec):
        record |= {"needs": _needs(spec), "formula": spec.formula, "source": spec.source, "tokens": spec.tokens}
    if isinstance(spec, OptimizerSpec):
        record["elementwise"] = spec.elementwise
    if isinstance(spec, SaverSpec):
        record["suffix"] = spec.suffix
    if isinstance(spec, BackendSpec):
        record |= {"components": list(spec.components), "reaches": {k: list(v) for k, v in spec.reaches.items()}}
        record["conditioning"] = list(spec.conditioning)
    record["options"] = [dataclasses.asdict(option) for option in describe_options(spec.options)]
    record["schema"] = options_schema(spec.options)
    return record


def _needs(spec: LossSpec) -> str:
    if not callable(spec.needs):
        return ", ".join(sorted(spec.needs))
    try:
        return f"depends on the options; {', '.join(sorted(spec.needs_for(spec.options())))} with the defaults"
    except Exception:  # options without defaults, or a function that cannot say
        return "depends on the options"


def _print_record(record: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    console = Console()
    console.print(f"[bold]{record['name']}[/] ({record['kind']}): {escape(record['summary'])}", highlight=False)
    of_a_loss, of_a_backend = ("needs", "formula", "source", "tokens"), ("components", "reaches", "conditioning")
    for key in (*of_a_loss, "elementwise", "suffix", *of_a_backend):
        if record.get(key) not in (None, ""):
            console.print(f"{key}: {escape(str(record[key]))}", highlight=False)
    origin = f"{record['distribution']} {record['version']}, module {record['module']}"
    console.print(f"from: {escape(origin)}", highlight=False)
    if not record["options"]:
        console.print("options: none", highlight=False)
        return
    columns: list[Column | str] = [Column("option", no_wrap=True), "type", "default", "bounds", Column("help", ratio=1)]
    table = Table(*columns, box=SIMPLE_HEAD)
    for option in record["options"]:
        default = "required" if option["required"] else str(option["default"])
        table.add_row(option["name"], option["type"], escape(default), option["bounds"], escape(option["help"]))
    console.print(table)
