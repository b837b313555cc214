"""The charts of a comparison's report."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lora_forge.comparison.curves import Curve
from lora_forge.comparison.statistics import Interval
from lora_forge.comparison.summary import CrossCell, ObjectiveSummary
from lora_forge.comparison.verdicts import LABELS
from lora_forge.inspection.report import shortened
from lora_forge.pages.bands import Band, bands
from lora_forge.pages.cross_map import cross_map
from lora_forge.pages.figures import QUIET, SERIES, Chart, hover_text
from lora_forge.pages.intervals import Mean, intervals
from lora_forge.pages.tables import shown

_TRAINED, _RANDOM = "trained", "random, of equal norm"
_COLOURS = {_TRAINED: SERIES[0], _RANDOM: QUIET}
_CHARTED = ("conditioning_shift", "specificity", "delta_norm", "effective_rank")
_STARTED_AT_ZERO = 1000.0  # a change this many times the first value


def interval_chart(objectives: Sequence[ObjectiveSummary]) -> Chart | None:
    """Means with their intervals, a view per measure; where there is one, beside the random LoRAs'."""
    names = [one.name for one in objectives]
    views = []
    for measure in _CHARTED:
        means = [
            _mean(one.name, series, interval)
            for one in objectives
            for series, interval in ((_TRAINED, one.measures[measure]), (_RANDOM, one.random.get(measure)))
            if interval is not None
        ]
        if means:
            views.append((LABELS[measure], intervals(names, means, _COLOURS)))
    if not views:
        return None
    return Chart("means and 95 % intervals", views, "points with whiskers: the numbers of the tables above and below")


def _mean(name: str, series: str, interval: Interval) -> Mean:
    lines = [
        shortened(name),
        f"{series}: {shown(interval.mean)}",
        "" if interval.low is None else f"95 % interval {shown(interval.low)} to {shown(interval.high)}",
        f"{interval.prompts} prompts",
    ]
    return Mean(name, series, interval.mean, interval.low, interval.high, hover_text(lines))


def cross_chart(objectives: Sequence[ObjectiveSummary]) -> Chart:
    """Shares of what each objective's own training does; a view for the trained LoRAs, and one for the random ones."""
    names = [one.name for one in objectives]

    def view(share: Callable[[CrossCell], float | None]) -> str:
        shares = [[share(one.cross[name]) for name in names] for one in objectives]
        hover = [[_cell_hover(one, name, share(one.cross[name])) for name in names] for one in objectives]
        return cross_map(names, names, shares, hover)

    views = [(_TRAINED, view(lambda cell: cell.share)), (_RANDOM, view(lambda cell: cell.random_share))]
    return Chart("trained (rows) × measured (columns)", views, "heat map of shares; its changes are in the table below")


def _cell_hover(one: ObjectiveSummary, measured: str, share: float | None) -> str:
    change = one.cross[measured].change
    return hover_text(
        [
            f"trained: {shortened(one.name)}",
            f"measured: {shortened(measured)}",
            f"change {shown(change.mean)} when trained" if change else "not measured",
            "" if share is None else f"{share:.3g} of what its own training does",
        ]
    )


def curve_chart(objectives: Sequence[ObjectiveSummary]) -> Chart | None:
    """Each objective over its steps: as a share of its largest change, and of its first value where that is not 0."""
    curves = [(one.name, one.curve) for one in objectives if one.curve is not None]
    of_change = [_scaled(name, curve, curve.largest or 1.0) for name, curve in curves]
    of_start = [
        _scaled(name, curve, abs(curve.start))
        for name, curve in curves
        if curve.largest < _STARTED_AT_ZERO * abs(curve.start)
    ]
    if not curves:
        return None
    views = [("of its largest change", bands(of_change, axis="share of the largest change"))]
    if of_start:
        views.append(("of its first value", bands(of_start, axis="share of the first value")))
    return Chart("change since the first step", views, f"curves of {len(curves)} objectives over their steps")


def _scaled(name: str, curve: Curve, scale: float) -> Band:
    low, high = ([one / scale for one in edge] if edge else None for edge in (curve.low, curve.high))
    return Band(shortened(name), curve.steps, [one / scale for one in curve.mean], low, high)
