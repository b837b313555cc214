"""`lora-forge batch`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_forge.cli.answer import json_alone
from lora_forge.cli.pairs import read_pair
from lora_forge.cli.registry import open_registry
from lora_forge.cli.run_options import run_options, shared_layers
from lora_forge.config.run import Choice, collect_run_config
from lora_forge.errors import ConfigError, printable
from lora_forge.jobs.reading import FORMATS

if TYPE_CHECKING:
    from lora_forge.jobs.job import Job
    from lora_forge.jobs.progress import JobState

_OF_ONE_RUN = ("prompt", "prompt_2", "output", "preview", "overwrite")


@click.command(name="batch", short_help="Make a LoRA for each of many prompts.")
@click.argument("source", metavar="INPUT")
@click.option("--output-dir", required=True, metavar="DIR", help="the folder to write to: a path, or a URL")
@click.option("--column", metavar="NAME", help="the column that holds the prompts  [default: prompt]")
@click.option(
    "--format",
    "input_format",
    type=click.Choice(FORMATS),
    help="of the input  [default: as its name says; text of stdin]",
)
@click.option("--batch-size", default="auto", metavar="N|auto", help="prompts to train side by side  [default: auto]")
@click.option("--threads", type=click.IntRange(1), metavar="N", help="CPU threads of a worker  [default: torch's own]")
@click.option("--executor", default="local", metavar="NAME", help="what carries the batches out  [default: local]")
@click.option("--executor-opt", multiple=True, metavar="KEY=VALUE", help="an option of it; repeatable")
@click.option("--retry-failed", is_flag=True, help="try prompts again that failed before")
@click.option("--overwrite", is_flag=True, help="replace files in DIR that no manifest knows")
@run_options(but=_OF_ONE_RUN)
@click.option("--config", type=Path, metavar="RUN.toml", help="a run config file; the command line wins over it")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object on stdout, all else on stderr")
def command(
    source: str,
    output_dir: str,
    column: str | None,
    input_format: str | None,
    batch_size: str,
    threads: int | None,
    executor: str,
    executor_opt: tuple[str, ...],
    retry_failed: bool,
    overwrite: bool,
    config: Path | None,
    as_json: bool,
    **given: Any,
) -> int:
    """Make a LoRA for each prompt of INPUT: text with a prompt a line, .csv, .tsv, .jsonl, or - for stdin.

    The LoRAs train side by side in batches. DIR gets a file for each prompt, and manifest.jsonl with a line for each.
    Stopped and begun again, it makes only what is missing.

    \b
    lora-forge batch prompts.txt --output-dir out --model tiny_sdxl
    """
    from lora_forge.jobs.columns import likely
    from lora_forge.jobs.rows import read_rows

    size = _batch_size(batch_size)
    with json_alone(as_json) as answer:
        found = read_rows(source, column=column, format=input_format)
        if found.ignored:
            names = ", ".join(printable(name) + likely(name) for name in found.ignored)
            click.echo(f"lora-forge: columns that say nothing to it: {names}", err=True)
        layers = shared_layers(config, _OF_ONE_RUN, "belongs to one run, not to a batch", given)

        from lora_forge.jobs.job import Job

        job = Job(
            layers=tuple(layers),
            rows=found.rows,
            output_dir=output_dir,
            batch_size=size,
            threads=threads,
            executor=Choice(executor, dict(read_pair(text, "--executor-opt") for text in executor_opt)),
            retry_failed=retry_failed,
            overwrite=overwrite,
        )
        state = _carry_out(job, config.name if config else "")
        if as_json:
            answer({**asdict(state), "left": state.left, "output_dir": output_dir})
    return 1 if state.failed else 0


def _carry_out(job: Job, source: str) -> JobState:
    from lora_forge.cli.batch_display import BatchProgress, print_state
    from lora_forge.cli.collector import StartUp
    from lora_forge.jobs.job import run_job

    run_config, mistakes = collect_run_config(job.layers)
    if mistakes:
        raise ConfigError(source, mistakes)
    registry = open_registry(run_config.plugins, strict=run_config.strict_plugins)
    with StartUp() as start_up, BatchProgress() as progress:
        registry.observe(start_up, "start_up")
        registry.observe(progress, "progress")
        state = run_job(job, registry, progress.watch)
    print_state(state, job.output_dir)
    return state


def _batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise click.UsageError(f"--batch-size takes a number from 1, or auto; got {text!r}")
    return int(text)
