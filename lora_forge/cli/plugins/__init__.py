"""`lora-forge plugins`: one module per verb."""

from __future__ import annotations

import click

from lora_forge.cli.verbs import Verbs

_VERBS = {
    "list": ("lora_forge.cli.plugins.list", "List what every plugin supplies, and what is broken and why."),
    "show": ("lora_forge.cli.plugins.show", "Show a plugin's options, what it needs, and where it comes from."),
    "check": ("lora_forge.cli.plugins.check", "Check a plugin against its contract, on a tiny model."),
    "new": ("lora_forge.cli.plugins.new", "Write a complete package for a new plugin."),
}


@click.group(name="plugins", cls=Verbs, verbs=_VERBS)
def command() -> None:
    """List, show, check and make plugins."""
