"""A group of commands that are imported when they are called, so that help imports none."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import click

from lora_forge.errors import nearest


class Verbs(click.Group):
    """verbs: name to (module whose `command` it is, one line of help)."""

    def __init__(self, *arguments: Any, verbs: Mapping[str, tuple[str, str]], **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._verbs = verbs

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._verbs:
            raise click.UsageError(f"unknown command {cmd_name!r}{nearest(cmd_name, self._verbs)}")
        command: click.Command = importlib.import_module(self._verbs[cmd_name][0]).command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise click.Abort from error  # before click sees it, which would print a line of its own

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self._verbs.items()])
