"""`lora-forge merge FILE[:WEIGHT]… -o OUT`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_forge.cli.convert import Format, described, family_option
from lora_forge.cli.registry import plugin_options, registry_when_needed

if TYPE_CHECKING:
    from lora_forge.conversion.merge import RankError


@click.command(name="merge")
@click.argument("files", metavar="FILE[:WEIGHT]...", nargs=-1, required=True)
@click.option("-o", "--output", required=True, type=Path, help="file to write")
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    default=None,
    help="the nearest LoRA of this rank  [default: as many as it takes]",
)
@click.option("--to", "format", type=Format(), default="safetensors", show_default=True, help="its format")
@family_option
@click.option("--overwrite", is_flag=True, help="replace the output if it exists")
@plugin_options
def command(
    files: tuple[str, ...],
    output: Path,
    rank: int | None,
    format: str,
    family: str | None,
    overwrite: bool,
    plugins: tuple[Path, ...],
    strict_plugins: bool,
) -> None:
    """Make one LoRA with the effect of several at once, each times its weight (1 if none is given).

    \b
    lora-forge merge style.safetensors:0.8 owl.safetensors:0.5 -o both.safetensors
    """
    from lora_forge.cli.display import print_warnings
    from lora_forge.conversion.convert import spelling_of
    from lora_forge.conversion.merge import Weighted, merge

    inputs = [Weighted(*_split(text)) for text in files]
    registry = registry_when_needed(plugins, strict=strict_plugins)
    done = merge(inputs, output, format, rank=rank, family=family, overwrite=overwrite, registry=registry)
    print_warnings(done.notes)
    click.echo(f"{done.output}: {spelling_of(format)}, {described(done.layers)}")
    for error in done.errors:
        click.echo(_in_words(error))


def _split(text: str) -> tuple[Path, float]:
    """The path and its weight; a path may have colons of its own."""
    path, colon, weight = text.rpartition(":")
    if not colon or not path or os.path.exists(text):
        return Path(text), 1.0
    try:
        return Path(path), float(weight)
    except ValueError as error:
        if os.path.exists(path):
            raise click.UsageError(f"the weight of {path!r} is {weight!r}, which is no number") from error
        return Path(text), 1.0


def _in_words(error: RankError) -> str:
    largest = f", {error.largest:.3g} in {error.layer}" if error.largest else ""
    return f"{error.component}: relative error {error.relative:.3g}{largest}"
