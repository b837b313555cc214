"""`lora-forge plugins new NAME --kind KIND`."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import click

from lora_forge.scaffold import KINDS, check_name, module_name, package_files, write_package

_RUN = 'run --prompt "a steampunk owl"'
_USE = {
    "loss": f"{_RUN} --model tiny_sdxl --loss {{module}}",
    "initializer": f"{_RUN} --model tiny_sdxl --initializer {{module}}",
    "optimizer": f"{_RUN} --model tiny_sdxl --optimizer {{module}}",
    "saver": f"{_RUN} --model tiny_sdxl --saver {{module}}",
    "backend": f"{_RUN} --model {{config}}",
    "executor": "batch prompts.txt --output-dir output --model tiny_sdxl --threads 1 --executor {module}",
}


@click.command(name="new")
@click.argument("name")
@click.option("--kind", type=click.Choice(KINDS), required=True, help="the extension point it is for")
@click.option("-o", "--output", type=Path, metavar="FOLDER", help="the folder to write, a new one  [default: NAME]")
def command(name: str, kind: str, output: Path | None) -> None:
    """Write a complete package for a new plugin: a small one that works, to be changed into yours.

    \b
    lora-forge plugins new my-loss --kind loss
    """
    check_name(name, kind)
    folder = output or Path(name)
    files = package_files(name, kind)
    write_package(folder, files)
    click.echo(f"{folder}/")
    click.echo("\n".join(_tree(files)))
    click.echo("\nNext:")
    for line in _next_commands(name, kind, folder):
        click.echo(f"  {line}")


def _tree(files: Iterable[str]) -> list[str]:
    """The files, indented under the folders they are in."""
    lines: list[str] = []
    shown: set[PurePosixPath] = set()
    for path in sorted(map(PurePosixPath, files), key=lambda path: (len(path.parts) == 1, path)):
        for folder in [*reversed(path.parents)][1:]:
            if folder not in shown:
                shown.add(folder)
                lines.append(f"{'  ' * len(folder.parts)}{folder.name}/")
        lines.append(f"{'  ' * len(path.parts)}{path.name}")
    return lines


def _next_commands(name: str, kind: str, folder: Path) -> list[str]:
    module = module_name(name)
    config = folder / "model_config" / f"{module}_config.json"
    use = _USE[kind].format(module=module, config=shlex.quote(str(config)))
    return [
        f'pip install -e "{folder}[test]"',
        f"pytest {shlex.quote(str(folder))}",
        f"lora-forge {use}",
    ]
