"""`lora-forge plugins list` and `lora-forge plugins show NAME`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_forge.cli.answer import json_alone
from lora_forge.errors import PluginError, nearest
from lora_forge.hookspecs import EXTENSION_POINTS
from lora_forge.options import describe_options
from lora_forge.plugins import Registry, Supplied, discover
from lora_forge.records import BackendSpec, LossSpec, OptimizerSpec, SaverSpec

_files = click.option(
    "--plugin", "files", multiple=True, type=Path, metavar="FILE.py", help="a plugin file to load too"
)
_kind = click.option("--kind", type=click.Choice(list(EXTENSION_POINTS)), help="only this extension point")
_json = click.option("--json", "as_json", is_flag=True, help="print JSON")


@click.group(name="plugins")
def command() -> None:
    """List and show plugins."""


@command.command(name="list")
@_kind
@_files
@_json
def list_plugins(kind: str | None, files: tuple[Path, ...], as_json: bool) -> None:
    """List what every plugin supplies, and which plugins are broken and why."""
    with json_alone(as_json) as answer:
        registry = discover(files)
    rows = [_row(registry, one) for k in ([kind] if kind else EXTENSION_POINTS) for one in registry.supplied[k]]
    broken = [{"plugin": p.id, "version": p.version, "error": p.error} for p in registry.broken]
    if as_json:
        answer({"plugins": rows, "broken": broken})
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    table = Table(Column("kind", no_wrap=True), Column("name", no_wrap=True), "summary", "from", "status")
    for row in rows:
        table.add_row(
            row["kind"], row["name"], escape(row["summary"]), f"{row['distribution']} {row['version']}", row["status"]
        )
    for one in broken:
        table.add_row("", "", escape(str(one["error"])), f"{one['plugin']} {one['version']}", "[red]broken[/]")
    Console().print(table)


@command.command(name="show")
@click.argument("name")
@_kind
@_files
@_json
def show_plugin(name: str, kind: str | None, files: tuple[Path, ...], as_json: bool) -> None:
    """Show one plugin's options, what it needs, and where it comes from."""
    with json_alone(as_json) as answer:
        registry = discover(files)
    found = _find(registry, name, kind)
    records = [_record(one) for one in found]
    if as_json:
        answer(records if len(records) > 1 else records[0])
        return
    for record in records:
        _print_record(record)


def _find(registry: Registry, name: str, kind: str | None) -> list[Supplied]:
    """What `name` means, of any kind (a name may be used once per kind). Raises PluginError."""
    kinds = [kind] if kind else list(EXTENSION_POINTS)
    found = [registry.resolve(k, name) for k in kinds if registry.candidates(k, name)]
    if not found:
        known = [one.qualified_name if ":" in name else one.spec.name for k in kinds for one in registry.supplied[k]]
        raise PluginError(f"unknown {kind or 'plugin'} {name!r}{nearest(name, known)}{registry.suspects(name)}")
    return found


def _row(registry: Registry, one: Supplied) -> dict[str, str]:
    rivals = [
        other.qualified_name
        for other in registry.supplied[one.spec.kind]
        if other.spec.name == one.spec.name and other is not one
    ]
    status = "ok"
    if rivals and not one.is_builtin:
        builtin = any(
            other.is_builtin for other in registry.supplied[one.spec.kind] if other.spec.name == one.spec.name
        )
        status = f"only as {one.qualified_name}" if builtin else f"conflicts with {', '.join(rivals)}"
    return {
        "kind": one.spec.kind,
        "name": one.spec.name,
        "summary": one.spec.summary,
        "distribution": one.plugin.distribution,
        "version": one.plugin.version,
        "status": status,
    }


def _record(one: Supplied) -> dict[str, Any]:
    spec = one.spec
    record: dict[str, Any] = {**one.provenance(), "summary": spec.summary}
    if isinstance(spec, LossSpec):
        needs = "depends on the options" if callable(spec.needs) else ", ".join(sorted(spec.needs))
        record |= {"needs": needs, "formula": spec.formula, "source": spec.source}
    if isinstance(spec, OptimizerSpec):
        record["elementwise"] = spec.elementwise
    if isinstance(spec, SaverSpec):
        record["suffix"] = spec.suffix
    if isinstance(spec, BackendSpec):
        record |= {"components": list(spec.components), "reaches": {k: list(v) for k, v in spec.reaches.items()}}
    record["options"] = [
        {
            "name": o.name,
            "type": o.type,
            "default": o.default,
            "required": o.required,
            "bounds": o.bounds,
            "help": o.help,
        }
        for o in describe_options(spec.options)
    ]
    return record


def _print_record(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    console = Console()
    console.print(f"[bold]{record['name']}[/] ({record['kind']}): {escape(record['summary'])}", highlight=False)
    for key in ("needs", "formula", "source", "elementwise", "suffix", "components", "reaches"):
        if record.get(key) not in (None, ""):
            console.print(f"{key}: {escape(str(record[key]))}", highlight=False)
    origin = f"{record['distribution']} {record['version']}, module {record['module']}"
    console.print(f"from: {escape(origin)}", highlight=False)
    if not record["options"]:
        console.print("options: none", highlight=False)
        return
    table = Table(Column("option", no_wrap=True), "type", "default", "bounds", "help")
    for option in record["options"]:
        default = "required" if option["required"] else str(option["default"])
        table.add_row(option["name"], option["type"], escape(default), option["bounds"], escape(option["help"]))
    console.print(table)
