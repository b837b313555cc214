"""`lora-forge inspect FILE…`: what is in a LoRA file, anybody's, and what it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_forge.cli.answer import json_alone
from lora_forge.cli.registry import plugin_options, registry_when_needed
from lora_forge.errors import LoraFileError, printable

if TYPE_CHECKING:
    from lora_forge.inspection.report import FileReport


@click.command(name="inspect")
@click.argument("files", metavar="FILE…", nargs=-1, required=True, type=Path)
@click.option("--headers", is_flag=True, help="read the files' headers alone, and none of their tensors")
@click.option("--layers", is_flag=True, help="list every layer, and all of the metadata")
@click.option("--json", "as_json", is_flag=True, help="print one JSON list, an object per file")
@click.option("--html", "page", type=Path, default=None, metavar="PAGE", help="write a page with heat maps and a table")
@click.option("--overwrite", is_flag=True, help="replace the page if it exists")
@plugin_options
def command(
    files: tuple[Path, ...],
    headers: bool,
    layers: bool,
    as_json: bool,
    page: Path | None,
    overwrite: bool,
    plugins: tuple[Path, ...],
    strict_plugins: bool,
) -> None:
    """Say what is in LoRA files, anybody's: .safetensors, or folders of PEFT's. Nothing of them is executed."""
    from lora_forge.inspection.report import report_file

    if page is not None:
        from lora_forge.output import check_apart, check_output

        check_apart(files, page)  # --overwrite replaces a page, never the LoRA it is about
        check_output(page, overwrite=overwrite)
    registry = registry_when_needed(plugins, strict=strict_plugins)
    reports: list[FileReport] = []
    refusals: list[str] = []
    for file in files:
        try:
            with _progress(file) as each:
                reports.append(report_file(file, measure=not headers, each=each, registry=registry))
        except LoraFileError as error:
            refusals.append(str(error))
    if as_json and reports:
        with json_alone(as_json) as answer:
            answer([report.as_dict() for report in reports])
    elif reports:
        from lora_forge.cli.inspect_tables import print_report

        for report in reports:
            print_report(report, every_layer=layers)
    refusals += [_unfit(report) for report in reports if report.lora.faults or not report.layers]
    if refusals:
        raise LoraFileError(refusals[0] if len(refusals) == 1 else "\n  ".join([f"{len(refusals)} files", *refusals]))
    if page is not None:
        from lora_forge.pages.lora_page import lora_page
        from lora_forge.pages.page import write_page

        write_page(page, lora_page(reports), overwrite=overwrite)
        if not as_json:
            click.echo(f"page: {printable(str(page))}")


def _unfit(report: FileReport) -> str:
    if not report.layers:
        tensors = sum(len(header.tensors) for header in report.lora.headers.values())
        return f"{str(report.lora.path)!r} is no LoRA: there is no LoRA layer among its {tensors} tensors"
    first, *others = report.lora.faults
    more = f" ({len(others)} more like it)" if others else ""
    return f"{str(report.lora.path)!r} is no whole LoRA: {first}{more}"


@contextmanager
def _progress(file: Path) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal while a file is read, and nothing elsewhere."""
    import sys

    if not sys.stderr.isatty():
        yield lambda total: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(escape(printable(file.name)), total=None)
        yield lambda total: bar.update(task, total=total, advance=1)
