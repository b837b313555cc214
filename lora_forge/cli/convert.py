"""`lora-forge convert IN OUT --to FORMAT`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_forge.cli.registry import plugin_options, registry_when_needed
from lora_forge.conversion.convert import convert
from lora_forge.files.formats import FORMATS

if TYPE_CHECKING:
    from lora_forge.files.layer_tensors import Layers

family_option = click.option(
    "--family",
    metavar="NAME",
    default=None,
    help="what it is a LoRA of, where nothing in the file tells: sdxl, sd15, or another backend's name",
)


class Format(click.Choice[str]):
    """One of the formats that are written."""

    def __init__(self) -> None:
        super().__init__(FORMATS)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if str(value).lower() == "kohya":
            self.fail(f"{value!r} is what 'safetensors' writes: kohya's keys; give --to safetensors", param, ctx)
        return super().convert(value, param, ctx)


@click.command(name="convert")
@click.argument("source", metavar="IN", type=Path)
@click.argument("output", metavar="OUT", type=Path)
@click.option("--to", "format", required=True, type=Format(), help="format of OUT; peft is a folder")
@click.option("--drop-unknown", is_flag=True, help="leave out what cannot be mapped, instead of refusing")
@family_option
@click.option("--overwrite", is_flag=True, help="replace OUT if it exists")
@plugin_options
def command(
    source: Path,
    output: Path,
    format: str,
    drop_unknown: bool,
    family: str | None,
    overwrite: bool,
    plugins: tuple[Path, ...],
    strict_plugins: bool,
) -> None:
    """Write a LoRA file in another format, with the same effect.

    IN is a .safetensors of kohya's, LyCORIS's, diffusers' or PEFT's spelling, or a folder of PEFT's.
    """
    from lora_forge.cli.display import print_warnings

    done = convert(
        source,
        output,
        format,
        drop_unknown=drop_unknown,
        family=family,
        overwrite=overwrite,
        registry=registry_when_needed(plugins, strict=strict_plugins),
    )
    print_warnings(done.notes)
    click.echo(f"{done.output}: {done.original} → {done.format}, {described(done.layers)}")


def described(layers: Layers) -> str:
    """Each component's layers, rank and alpha, in words."""
    from lora_forge.files.scaling import by_component

    parts = []
    for component, own in by_component(layers).items():
        first = next(iter(own.values()))
        parts.append(f"{component} {len(own)} layers of rank {first.rank} and alpha {first.alpha:g}")
    return ", ".join(parts)
