"""`lora-forge plugins list`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_forge.cli.answer import json_alone
from lora_forge.cli.plugins.options import json_option, kind_option, plugin_files, strict_option
from lora_forge.cli.registry import cost
from lora_forge.hookspecs import EXTENSION_POINTS
from lora_forge.plugins import Plugin, Registry, Supplied, discover


@click.command(name="list")
@kind_option
@plugin_files
@strict_option
@json_option
def command(kind: str | None, files: tuple[Path, ...], strict: bool, as_json: bool) -> None:
    """List what every plugin supplies, and which plugins are broken and why."""
    with json_alone(as_json) as answer:
        registry = discover(files, strict=strict)
    rows = [_row(registry, one) for k in ([kind] if kind else EXTENSION_POINTS) for one in registry.supplied[k]]
    if kind is None:
        rows += _rows_without_specs(registry)
    broken = [{"plugin": p.id, "version": p.version, "error": p.error} for p in registry.broken]
    slow = [{"plugin": p.id, "seconds": round(p.seconds, 3), "imports": list(p.heavy)} for p in _costly(registry)]
    if as_json:
        answer({"plugins": rows, "broken": broken, "slow": slow})
        return
    from rich.console import Console

    console = Console()
    console.print(_table(rows))
    for one in broken:
        _note(console, f"[red]broken[/]: {one['plugin']} {one['version']}", str(one["error"]))
    for plugin in _costly(registry):
        _note(console, f"[yellow]slow[/]: {plugin.id}", cost(plugin))


def _row(registry: Registry, one: Supplied) -> dict[str, str]:
    return {
        "kind": one.spec.kind,
        "name": one.spec.name,
        "summary": one.spec.summary,
        "distribution": one.plugin.distribution,
        "version": one.plugin.version,
        "status": _status(registry, one),
    }


def _status(registry: Registry, one: Supplied) -> str:
    rivals = [other for other in registry.candidates(one.spec.kind, one.spec.name) if other is not one]
    if one.is_builtin or not rivals:
        return "ok"
    if any(other.is_builtin for other in rivals):
        return f"shadows nothing; call it {one.qualified_name}"
    return f"conflicts with {', '.join(other.qualified_name for other in rivals)}; call it {one.qualified_name}"


def _rows_without_specs(registry: Registry) -> list[dict[str, str]]:
    """Plugins that only observe lifecycle events, or supply nothing at all."""
    watching = dict(registry.observers())
    supplying = {one.plugin for kind in EXTENSION_POINTS for one in registry.supplied[kind]}
    rows = []
    for plugin in registry.plugins:
        events = ", ".join(hook.removeprefix("lora_forge_") for hook in watching.get(plugin, ()))
        if plugin.error or (plugin in supplying and not events):
            continue
        rows.append(
            {
                "kind": "observer" if events else "",
                "name": plugin.id,
                "summary": f"observes {events}" if events else "",
                "distribution": plugin.distribution,
                "version": plugin.version,
                "status": "ok" if events else "supplies nothing",
            }
        )
    return rows


def _costly(registry: Registry) -> list[Plugin]:
    return [plugin for plugin in registry.plugins if cost(plugin)]


def _table(rows: list[dict[str, str]]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Column, Table

    unusual = any(row["status"] != "ok" for row in rows)
    whole = min(28, max((len(row["name"]) for row in rows), default=0))
    name = Column("name", overflow="fold", min_width=whole)
    origin = Column("from", overflow="fold")
    table = Table(Column("kind", no_wrap=True), name, Column("summary", ratio=1), origin, box=SIMPLE_HEAD)
    if unusual:
        table.add_column("status", ratio=1)
    for row in rows:
        cells = [row["kind"], row["name"], escape(row["summary"]), f"{row['distribution']} {row['version']}"]
        table.add_row(*cells, *([row["status"]] if unusual else []))
    return table


def _note(console: Any, what: str, why: str) -> None:
    from rich.markup import escape

    console.print(f"{what}: {escape(why)}", highlight=False, soft_wrap=not console.is_terminal)
