"""A run in flat names and plain values, the same for every tracker."""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lora_forge.events import RunInfo, RunStart, StepFinish

if TYPE_CHECKING:
    from lora_forge import RunResult

Plain = str | int | float | bool


def hyperparameters(event: RunStart) -> dict[str, Plain]:
    """The run's record, flattened: `rank`, `optimizer/name`, `optimizer/options/lr`, `loss/<label>/weight`.

    What is None is left out.
    """
    about = {"run_id": event.run.id, "batch_id": event.run.batch_id, **event.record}
    return {_key(name): value for name, value in _flat("", about)}


def step_values(event: StepFinish) -> dict[str, float]:
    """`loss`, `l2`, `terms/<label>` and `gradient_norm/<component>` of one step."""
    return {
        "loss": event.loss,
        "l2": event.l2,
        **{_key(f"terms/{label}"): value for label, value in event.terms.items()},
        **{_key(f"gradient_norm/{component}"): value for component, value in event.gradient_norms.items()},
    }


def summary(result: RunResult) -> dict[str, float]:
    """What is known at the end: the loss before and after, the strength, the effect, and seconds by phase."""
    effect = result.effect
    values: dict[str, float | None] = {
        "loss_before": result.loss_before,
        "loss_after": result.loss_after,
        "strength": result.strength,
        "effect/conditioning_shift": effect.conditioning_shift,
    }
    for shift in effect.shifts:
        values |= {f"effect/shift/{shift.name}": shift.relative, f"effect/cosine/{shift.name}": shift.cosine}
    for one in effect.components:
        values[f"effect/delta_norm/{one.component}"] = one.delta_norm
        values[f"effect/largest_relative_change/{one.component}"] = one.largest_relative_change
    values |= {f"seconds/{phase}": seconds for phase, seconds in result.seconds.items()}
    return {_key(name): value for name, value in values.items() if value is not None}


def title(run: RunInfo) -> str:
    """The beginning of the prompt on one line, for a list of runs."""
    line = " ".join(text(run.prompt).split())
    return line if len(line) <= 80 else line[:79] + "…"


def error_text(error: BaseException) -> str:
    """What went wrong, with the error's type."""
    return text("".join(traceback.format_exception_only(error)).strip())


def text(value: str) -> str:
    """A text that can be written as UTF-8: paths may hold bytes that are none."""
    return value.encode("utf-8", "replace").decode("utf-8")


def _flat(name: str, value: Any) -> Iterator[tuple[str, Plain]]:
    if isinstance(value, Mapping):
        # Of a plugin's provenance, its distribution and version say all.
        skipped = {"kind", "module"} if "distribution" in value else set()
        for key, inner in value.items():
            if key not in skipped:
                yield from _flat(f"{name}/{key}" if name else key, inner)
    elif isinstance(value, list) and value and all(isinstance(one, Mapping) and "label" in one for one in value):
        for one in value:
            yield from _flat(f"{name}/{one['label']}", {key: one[key] for key in one if key != "label"})
    elif isinstance(value, str):
        yield name, text(value)
    elif isinstance(value, (bool, int, float)):
        yield name, value
    elif value is not None:
        yield name, text(json.dumps(value, ensure_ascii=False))


def _key(name: str) -> str:
    """A name in the alphabet all trackers take. `#` numbers terms of one loss: `quiet#2` becomes `quiet.2`."""
    return re.sub(r"[^\w./-]", "_", name.replace("#", "."), flags=re.ASCII)
