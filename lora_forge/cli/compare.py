"""`lora-forge compare`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from lora_forge.cli.answer import json_alone
from lora_forge.cli.prompt_file import prompt_file
from lora_forge.cli.registry import open_registry
from lora_forge.cli.run_options import run_options, shared_layers
from lora_forge.comparison import CONTROLS, SEEDS
from lora_forge.config.run import collect_run_config
from lora_forge.errors import ConfigError, UsageError, printable

if TYPE_CHECKING:
    from lora_forge.comparison.compare import Comparison
    from lora_forge.comparison.results import Results
    from lora_forge.jobs.progress import Watch
    from lora_forge.plugins import Registry

REPORT = "report.html"
_NOT_SHARED = ("prompt", "prompt_2", "output", "preview", "overwrite", "seed")  # by the LoRAs of a comparison
_OWN = ("loss", "measure", "probe", "paraphrases", "controls")  # what a comparison says itself


@click.command(name="compare", short_help="Compare objectives on the same prompts, seeds and budget.")
@click.option("--prompts", metavar="FILE", help="prompts as `batch` reads them: text, .csv, .tsv, .jsonl, or -")
@click.option("--column", metavar="NAME", help="the column that holds the prompts  [default: prompt]")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="take N of them, drawn with a fixed seed")
@click.option(
    "--loss", multiple=True, metavar="OBJECTIVE", help='such as A, "A(key=value)" or "A + 0.1*B@linear"; repeatable'
)
@click.option("--seeds", type=click.IntRange(1), default=SEEDS, show_default=True, metavar="N", help="0 to N - 1, each")
@click.option(
    "--seconds", type=click.FloatRange(0, min_open=True), metavar="X", help="end each LoRA's training after so many"
)
@click.option("--paraphrases", type=Path, metavar="FILE.txt", help="texts with {prompt} in them, one a line")
@click.option("--controls", type=Path, metavar="FILE.txt", help="draw control prompts from these, one a line")
@click.option(
    "--random", "number", type=click.IntRange(0), metavar="N", help=f"control prompts to draw  [default: {CONTROLS}]"
)
@click.option("--output-dir", metavar="DIR", help="the folder to write to")
@click.option("--batch-size", type=click.IntRange(1), metavar="N", help="LoRAs to train side by side  [default: auto]")
@click.option("--threads", type=click.IntRange(1), metavar="N", help="CPU threads  [default: torch's own]")
@click.option("--retry-failed", is_flag=True, help="try again what failed before")
@click.option("--images", is_flag=True, help="draw the first prompts without and with each LoRA, and a control prompt")
@click.option("--no-report", is_flag=True, help=f"do not write DIR/{REPORT}")
@click.option("--from", "source", metavar="DIR", help="make the report again of DIR/results.jsonl alone")
@run_options(but=(*_NOT_SHARED, *_OWN))
@click.option("--config", type=Path, metavar="RUN.toml", help="a run config file; the command line wins over it")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object on stdout, all else on stderr")
def command(output_dir: str | None, source: str | None, no_report: bool, as_json: bool, **given: Any) -> int:
    """Compare objectives: a LoRA of each for every prompt and seed, under one budget.

    DIR gets a folder of LoRAs for each objective, results.jsonl, and a report. Stopped and begun again, it makes only
    what is missing.

    \b
    lora-forge compare --prompts prompts.txt --loss embedding_magnitude \\
        --loss "conditioning_magnitude + 0.1*embed_preserve" --output-dir compared --model tiny_sdxl
    """
    from lora_forge.comparison.statistics import check_installed

    check_installed()
    with json_alone(as_json) as answer:
        results = _again(source) if source is not None else _compared(output_dir, **given)
        folder = output_dir or _folder(source or "")
        report = None if no_report else _report(folder, results)
        failed = sum(row.error is not None for row in results.rows)
        if as_json:
            from lora_forge.comparison.summary import summarize
            from lora_forge.comparison.verdicts import verdicts

            summary = summarize(results)
            told = {"output_dir": folder, "report": report, "loras": len(results.rows) - failed, "failed": failed}
            answer({**told, **summary.as_dict(), "verdicts": verdicts(summary)})
        else:
            _print(results, report)
    return 1 if failed else 0


def _again(source: str) -> Results:
    from lora_forge.comparison.results import read_results

    context = click.get_current_context()
    other = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name not in ("source", "no_report", "as_json")
        and context.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE
    ]
    if other:
        raise UsageError(f"--from makes a report of results there are; it takes no {', '.join(other)}")
    return read_results(source)


def _folder(source: str) -> str:
    """The folder of results, where the file in it was given."""
    from lora_forge.comparison.results import NAME

    return os.path.dirname(source) or "." if os.path.basename(source) == NAME else source


def _compared(output_dir: str | None, *, images: bool, **given: Any) -> Results:
    for option, value in (("--prompts", given["prompts"]), ("--loss", given["loss"]), ("--output-dir", output_dir)):
        if not value:
            raise UsageError(f"give {option}, or a finished comparison with --from")
    if images:
        from lora_forge.comparison.images import folder_of_images

        folder_of_images(output_dir or "")
    asked = _asked(output_dir or "", **given)
    config, mistakes = collect_run_config(asked.layers)
    if mistakes:
        raise ConfigError("", mistakes)
    registry = open_registry(config.plugins, strict=config.strict_plugins)
    from lora_forge.cli.collector import StartUp
    from lora_forge.comparison.compare import compare

    with StartUp() as start_up:
        registry.observe(start_up, "start_up")
        results = compare(asked, registry, _Watching(registry, len(asked.objectives)).watch)
    return _with_images(asked, results, registry) if images else results


def _asked(
    output_dir: str,
    *,
    prompts: str,
    column: str | None,
    limit: int | None,
    loss: tuple[str, ...],
    seeds: int,
    seconds: float | None,
    paraphrases: Path | None,
    controls: Path | None,
    number: int | None,
    batch_size: int | None,
    threads: int | None,
    retry_failed: bool,
    config: Path | None,
    **given: Any,
) -> Comparison:
    from lora_forge.comparison.compare import PARAPHRASES, Comparison

    layers = shared_layers(config, (*_NOT_SHARED, *_OWN), "is not for a run config of a comparison", given)
    return Comparison(
        layers=tuple(layers),
        objectives=loss,
        prompts=_prompts(prompts, column, limit),
        seeds=tuple(range(seeds)),
        output_dir=output_dir,
        seconds=seconds,
        paraphrases=PARAPHRASES if paraphrases is None else prompt_file("--paraphrases", paraphrases),
        controls=_drawn(controls, number),
        batch_size=batch_size,
        threads=threads,
        retry_failed=retry_failed,
    )


def _prompts(source: str, column: str | None, limit: int | None) -> tuple[str, ...]:
    """The prompts, each once. Raises UsageError for rows with settings of their own, which would not be compared."""
    from lora_forge.effect.control_prompts import drawn
    from lora_forge.jobs.rows import read_rows

    rows = read_rows(source, column=column).rows
    for row in rows:
        if row.error:
            raise UsageError(f"{source!r}, row {row.number}: {row.error}")
        if row.overrides or row.prompt_2 is not None or row.seed is not None:
            raise UsageError(f"{source!r}, row {row.number}: a comparison gives all prompts the same settings")
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    if limit is None:
        return tuple(prompts)
    if limit > len(prompts):
        raise UsageError(f"--limit: {limit} prompts were asked for, {source!r} has {len(prompts)}")
    taken = set(drawn(prompts, limit, seed=0))
    return tuple(prompt for prompt in prompts if prompt in taken)


def _drawn(path: Path | None, number: int | None) -> tuple[str, ...]:
    from lora_forge.effect.control_prompts import CONTROL_PROMPTS, drawn

    pool = CONTROL_PROMPTS if path is None else prompt_file("--controls", path)
    if number is not None and number > len(pool):
        source = "the list that ships" if path is None else repr(str(path))
        raise UsageError(f"--random: {number} control prompts were asked for, {source} has {len(pool)}")
    return tuple(drawn(pool, CONTROLS if number is None else number, seed=0))


class _Watching:
    """The progress of one objective after another."""

    def __init__(self, registry: Registry, objectives: int) -> None:
        self._registry, self._objectives = registry, objectives
        self._begun = 0

    @contextmanager
    def watch(self, name: str) -> Iterator[Watch]:
        from lora_forge.cli.batch_display import BatchProgress

        self._begun += 1
        click.echo(f"objective {self._begun} of {self._objectives}: {printable(name)}", err=True)
        with BatchProgress() as progress:
            self._registry.observe(progress, f"progress {self._begun}")
            yield progress.watch


def _with_images(asked: Comparison, results: Results, registry: Registry) -> Results:
    from lora_forge.cli.on_model import progress
    from lora_forge.comparison.images import draw_images

    with progress("drawing") as each:
        results, notes = draw_images(asked, results, registry, each)
    for note in notes:
        click.echo(f"lora-forge: warning: {note}", err=True)
    return results


def _report(folder: str, results: Results) -> str:
    from lora_forge.output import place_of
    from lora_forge.pages.compare_page import compare_page
    from lora_forge.pages.page import write_page

    place = place_of(folder)
    write_page(place / REPORT, compare_page(results, place if isinstance(place, Path) else None), overwrite=True)
    return str(place / REPORT)


def _print(results: Results, report: str | None) -> None:
    from lora_forge.cli.compare_tables import print_comparison
    from lora_forge.comparison.summary import summarize

    print_comparison(results.header, summarize(results))
    if report is not None:
        click.echo(f"report: {printable(report)}")
