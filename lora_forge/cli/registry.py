"""The plugins of a command, and a line on stderr for each that is broken or slow."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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


def plugin_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--plugin` and `--strict-plugins`, for a verb that may need a plugin."""
    function = click.option("--strict-plugins", is_flag=True, help="any broken plugin is an error")(function)
    return click.option(
        "--plugin", "plugins", multiple=True, type=Path, metavar="FILE.py", help="a plugin file to load too; repeatable"
    )(function)


def registry_when_needed(files: Sequence[Path], *, strict: bool) -> Callable[[], Registry]:
    """The plugins, opened at once where a user asks for one or for all to be whole, else when they are first needed."""
    opened = functools.cache(lambda: open_registry(files, strict=strict))
    if files or strict:
        opened()
    return opened


def cost(plugin: Plugin) -> str:
    """What a plugin's import cost, in words; "" if next to nothing."""
    if plugin.seconds < SLOW_SECONDS and not plugin.heavy:
        return ""
    because = f", since it imports {', '.join(plugin.heavy)}" if plugin.heavy else ""
    return f"took {plugin.seconds:.1f} s to import{because}"
