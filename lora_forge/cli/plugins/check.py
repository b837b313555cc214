"""`lora-forge plugins check NAME`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_forge.cli.answer import json_alone
from lora_forge.cli.pairs import read_pair
from lora_forge.cli.plugins.options import json_option, kind_option, plugin_files, strict_option
from lora_forge.cli.registry import open_registry

if TYPE_CHECKING:
    from lora_forge.testing import Examination


@click.command(name="check")
@click.argument("name")
@kind_option
@plugin_files
@click.option("--opt", "given", multiple=True, metavar="KEY=VALUE", help="an option of the plugin; repeatable")
@strict_option
@json_option
def command(
    name: str, kind: str | None, files: tuple[Path, ...], given: tuple[str, ...], strict: bool, as_json: bool
) -> int:
    """Check a plugin against its contract: run it on a tiny model, and say in words what is wrong.

    The exit code is 1 if anything is.
    """
    options = dict(read_pair(text, "--opt") for text in given)
    with json_alone(as_json) as answer:
        registry = open_registry(files, strict=strict)

        from lora_forge.testing.named import examine_named

        examinations = list(examine_named(registry, name, kind, options))
    if as_json:
        records = [_record(one) for one in examinations]
        answer(records if len(records) > 1 else records[0])
    else:
        for one in examinations:
            _print_examination(one)
    return 1 if any(one.findings for one in examinations) else 0


def _record(one: Examination) -> dict[str, Any]:
    return {
        "kind": one.kind,
        "name": one.name,
        "checked": list(one.checked),
        "findings": [{"rule": finding.rule, "message": finding.message} for finding in one.findings],
    }


def _print_examination(one: Examination) -> None:
    from rich.console import Console
    from rich.markup import escape

    from lora_forge.testing import RULES

    console = Console()

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=not console.is_terminal)

    say(f"[bold]{one.name}[/] ({one.kind})")
    messages: dict[str, list[str]] = {}
    for finding in one.findings:
        messages.setdefault(finding.rule, []).append(finding.message)
    for rule, promise in RULES[one.kind].items():
        if rule in messages:
            say(f"[red]✗[/] {rule}: {escape(promise)}")
            for message in messages[rule]:
                say(f"    [red]{escape(message)}[/]")
        elif rule in one.checked:
            say(f"[green]✓[/] {rule}: {escape(promise)}")
        elif messages:
            say(f"[dim]– {rule}: not checked[/]")
    count = len(one.findings)
    say(f"{count} finding{'' if count == 1 else 's'}" if count else f"{len(one.checked)} rules kept")
