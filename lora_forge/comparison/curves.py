"""How objectives go down over the steps, on average over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_forge.comparison.results import Measured, Row
from lora_forge.comparison.statistics import interval

_MOST = 200  # points of a curve


@dataclass(frozen=True)
class Curve:
    """The objective before each update, since the first step: its mean over prompts, and the mean's 95 % interval.

    steps: where it is given, the first being step 1. start: the mean at step 1. low, high: None of one prompt alone.
    """

    steps: tuple[int, ...]
    start: float
    mean: tuple[float, ...]
    low: tuple[float, ...] | None
    high: tuple[float, ...] | None

    @property
    def largest(self) -> float:
        """The largest change of the mean, either way."""
        return max(map(abs, self.mean))


def curve_of(rows: Sequence[Row]) -> Curve | None:
    """The curve of one objective's rows; a run that stopped before others stays at its last value.

    A run of which a step is not known is left out; None if there is no other.
    """
    runs = {(row.prompt, row.seed): steps for row in rows if row.measured and (steps := _steps(row.measured))}
    starts = interval({key: steps[0] for key, steps in runs.items()})
    if starts is None:
        return None
    length = max(map(len, runs.values()))
    shown = sorted({round(place * (length - 1) / (_MOST - 1)) for place in range(_MOST)})
    intervals = [one for place in shown if (one := interval(_changes(runs, place)))]
    lows = [one.low for one in intervals if one.low is not None]
    highs = [one.high for one in intervals if one.high is not None]
    return Curve(
        steps=tuple(place + 1 for place in shown),
        start=starts.mean,
        mean=tuple(one.mean for one in intervals),
        low=tuple(lows) or None,
        high=tuple(highs) or None,
    )


def _steps(measured: Measured) -> list[float]:
    steps = [step for step in measured.steps if step is not None]
    return steps if len(steps) == len(measured.steps) else []


def _changes(runs: dict[tuple[str, int], list[float]], place: int) -> dict[tuple[str, int], float]:
    return {key: steps[min(place, len(steps) - 1)] - steps[0] for key, steps in runs.items()}
