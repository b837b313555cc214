"""Options of plugins as typed on a command line: `KEY=VALUE`."""

from __future__ import annotations

import click

from lora_forge.options import Text


def read_pair(text: str, option: str) -> tuple[str, Text]:
    """The key and the value. Raises click.UsageError that names the option of the command line."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise click.UsageError(f"{option} takes KEY=VALUE, got {text!r}")
    return key.strip(), Text(value)
