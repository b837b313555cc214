"""What people see of a sweep: a line for each trial on stderr, the outcome on stdout."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from typing import Any

import click

from lora_forge_optuna.sweep import Line, Outcome, Sweep


def print_trial(asked: Sweep, line: Line, progress: str, best: bool) -> None:
    value = "–" if line.value is None else f"{line.value:.6g}"
    words = [progress, f"{asked.metric.name} {value}", _params(line.params)]
    if line.state != "complete":
        words.append(line.state)
    if line.repeats is not None:
        words.append(f"as trial {line.repeats}")
    if best:
        words.append("best so far")
    click.echo("  ".join(words) + (f"\n  {line.error}" if line.error else ""), err=True)


def print_outcome(asked: Sweep, outcome: Outcome) -> None:
    best, counts = outcome.best, Counter(line.state for line in outcome.lines)
    means = f"mean over {_count(len(asked.prompts), 'prompt')} × {_count(asked.seeds, 'seed')}"
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    where = f"trial {best.trial} of {len(outcome.lines)} ({states})"
    click.echo(f"{asked.metric.name} {best.value:.6g}, {means}: {where}")
    rows = [(key, _short(value)) for key, value in best.params.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for key, value in rows:
        share = f"   importance {outcome.importances[key]:.2f}" if key in outcome.importances else ""
        click.echo(f"  {key:<{widths[0]}}  {value:<{widths[1]}}{share}".rstrip())
    if not outcome.importances:
        click.echo("  too few trials to tell what matters")
    click.echo(f"\nall trials: {outcome.table}\nuse the best:")
    prompt = shlex.quote(asked.prompts[0])
    click.echo(f"  lora-forge run --prompt {prompt} --config {shlex.quote(str(outcome.config))}")
    click.echo(f"or, spelled out:\n  {outcome.command}")


def as_record(asked: Sweep, outcome: Outcome) -> dict[str, Any]:
    """The outcome, ready for JSON."""
    return {
        "study": asked.study,
        "metric": asked.metric.name,
        "direction": asked.metric.direction,
        "prompts": len(asked.prompts),
        "seeds": asked.seeds,
        "trials": Counter(line.state for line in outcome.lines),
        "best": {
            "trial": outcome.best.trial,
            "value": outcome.best.value,
            "params": outcome.best.params,
            "settings": outcome.best.settings,
        },
        "importances": outcome.importances,
        "command": outcome.command,
        "config": str(outcome.config),
        "table": str(outcome.table),
    }


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _params(params: Mapping[str, Any]) -> str:
    return "  ".join(f"{key}={_short(value)}" for key, value in params.items())


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
