"""Options that the verbs about plugins share."""

from __future__ import annotations

from pathlib import Path

import click

from lora_forge.hookspecs import EXTENSION_POINTS

plugin_files = click.option(
    "--plugin", "files", multiple=True, type=Path, metavar="FILE.py", help="a plugin file to load too; repeatable"
)
kind_option = click.option("--kind", type=click.Choice(list(EXTENSION_POINTS)), help="only this extension point")
json_option = click.option("--json", "as_json", is_flag=True, help="print JSON")
strict_option = click.option("--strict-plugins", "strict", is_flag=True, help="any broken plugin is an error")
