"""The plugins of a command, and a line on stderr for each that is broken or slow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from lora_forge.plugins import Plugin, Registry, discover

SLOW_SECONDS = 1.0


def open_registry(files: Sequence[Path] = (), *, strict: bool = False) -> Registry:
    """Discover plugins. Raises PluginError as `lora_forge.plugins.discover` does."""
    registry = discover(files, strict=strict)
    for plugin in registry.plugins:
        slow = cost(plugin) if plugin.seconds >= SLOW_SECONDS else ""
        if plugin.error:
            why = f"{plugin.error} (it {slow})" if slow else plugin.error
            click.echo(f"lora-forge: plugin {plugin.id} is broken and ignored: {why}", err=True)
        elif slow:
            click.echo(f"lora-forge: plugin {plugin.id} {slow}", err=True)
    return registry


def cost(plugin: Plugin) -> str:
    """What a plugin's import cost, in words; "" if next to nothing."""
    if plugin.seconds < SLOW_SECONDS and not plugin.heavy:
        return ""
    because = f", since it imports {', '.join(plugin.heavy)}" if plugin.heavy else ""
    return f"took {plugin.seconds:.1f} s to import{because}"
