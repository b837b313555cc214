"""`lora-forge-sweep`."""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import sys
import tomllib
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from lora_forge.errors import LoraForgeError, Terminated, UsageError
from lora_forge.prompts import read_prompt_file
from lora_forge_optuna.keys import read_pair, read_value
from lora_forge_optuna.metrics import CONTROLS, read_metric
from lora_forge_optuna.settings import Settings
from lora_forge_optuna.space import read_space

if TYPE_CHECKING:
    from lora_forge_optuna.sweep import Sweep


@click.command(name="lora-forge-sweep", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--prompt", multiple=True, metavar="TEXT", help="a prompt to make LoRAs for; repeatable")
@click.option("--prompts", type=Path, metavar="FILE", help="prompts, one a line")
@click.option("--model", metavar="TEXT", help="model config: a name, or a path to a JSON file")
@click.option("--loss", multiple=True, metavar="NAME[:WEIGHT][@SCHEDULE]", help="a term of the objective; repeatable")
@click.option("--config", type=Path, metavar="RUN.toml", help="a run config file, for all else")
@click.option("--set", "fixed", multiple=True, metavar="KEY=VALUE", help="a setting of all trials; repeatable")
@click.option(
    "--search",
    multiple=True,
    required=True,
    metavar="KEY=SPACE",
    help="a setting to search: LOW..HIGH, LOW..HIGH log, LOW..HIGH step STEP or A|B|C; repeatable",
)
@click.option(
    "--metric",
    required=True,
    metavar="NAME",
    help="specificity, conditioning_shift, effective_rank, loss or measure:NAME, a loss that is not trained",
)
@click.option("--direction", type=click.Choice(["auto", "min", "max"]), default="auto", help="[default: losses down]")
@click.option("--controls", type=Path, metavar="FILE", help="prompts that specificity is held against  [default: six]")
@click.option("--trials", type=click.IntRange(1), metavar="N", help="in all  [default: 20; of a grid, every point]")
@click.option("--seeds", type=click.IntRange(1), default=1, metavar="N", help="seeds of each prompt  [default: 1]")
@click.option("--sampler", type=click.Choice(["tpe", "random", "grid"]), default="tpe", help="[default: tpe]")
@click.option("--pruner", type=click.Choice(["none", "median"]), default="none", help="[default: none]")
@click.option("--seed", type=int, default=0, metavar="N", help="of the sampler  [default: 0]")
@click.option("--storage", metavar="URL|FILE", help="where Optuna keeps trials  [default: DIR/study.journal]")
@click.option("--study", default="sweep", metavar="NAME", help="the study's name in there  [default: sweep]")
@click.option("--output-dir", required=True, type=Path, metavar="DIR", help="for sweep.jsonl and best.toml")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object on stdout, all else on stderr")
def command(as_json: bool, **given: Any) -> None:
    """Search for good settings of a run, with Optuna.

    \b
    lora-forge-sweep --prompt "a steampunk owl" --model tiny_sdxl \\
      --search "rank=2|4|8" --search "optimizer.lr=1e-5..1e-2 log" \\
      --metric specificity --output-dir output/sweep

    Begun again, it goes on where it was.
    """
    asked = _read(**given)

    from lora_forge_optuna.display import as_record, print_outcome, print_trial
    from lora_forge_optuna.sweep import sweep

    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        outcome = sweep(asked, functools.partial(print_trial, asked))
    if as_json:
        click.echo(json.dumps(as_record(asked, outcome), ensure_ascii=False), file=stdout)
    else:
        print_outcome(asked, outcome)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1, 2, 130 (Ctrl-C) or 143 (SIGTERM)."""
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        result: Any = command.main(arguments, prog_name="lora-forge-sweep", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except LoraForgeError as error:
        return _fail(f"error: {error}", error.exit_code)
    except click.ClickException as error:
        message = error.format_message()
        return _fail(f"error: {message[:1].lower()}{message[1:]}", error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted; begun again, it goes on", 130)
    except Terminated:
        return _fail("terminated; begun again, it goes on", 143)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _fail(message: str, code: int) -> int:
    click.echo(f"lora-forge-sweep: {message}", err=True)
    return code


def _read(
    prompt: tuple[str, ...],
    prompts: Path | None,
    model: str | None,
    loss: tuple[str, ...],
    config: Path | None,
    fixed: tuple[str, ...],
    search: tuple[str, ...],
    metric: str,
    direction: str,
    controls: Path | None,
    **given: Any,
) -> Sweep:
    """What was asked for, checked as far as it can be before torch is imported."""
    texts = tuple(dict.fromkeys([*prompt, *(_prompts(prompts) if prompts else ())]))
    if not all(text.strip() for text in texts or ("",)):
        raise UsageError('there is no prompt; give --prompt "a steampunk owl", or --prompts FILE')
    read = read_metric(metric, direction, _prompts(controls) if controls else CONTROLS)
    named = {key: value for key, value in (("model", model), ("loss", loss)) if value}
    settings = Settings.read({**(_toml(config) if config else {}), **named})
    pairs = [(key, read_value(text)) for key, text in (read_pair(one, "--set") for one in fixed)]
    space = read_space(search, read.prepare(settings), pairs)

    from lora_forge_optuna.sweep import Sweep

    return Sweep(space, read, texts, **given)


def _prompts(path: Path) -> tuple[str, ...]:
    try:
        return read_prompt_file(path)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: run config cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path.name}: not valid TOML: {error}") from error
