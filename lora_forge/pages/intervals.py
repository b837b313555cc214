"""Means with their confidence intervals, one below the other."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_forge.errors import printable
from lora_forge.pages.figures import FAINT, LINE, figure_json, label, legend_above, plain

_ROW, _TOP, _BOTTOM = 30, 34, 34  # pixels
LONGEST = 24  # letters of a name
_APART = 0.13  # of a row, between series


@dataclass(frozen=True)
class Mean:
    """A point of a series in the row of this name. low, high: None where there is no interval."""

    name: str
    series: str
    value: float
    low: float | None
    high: float | None
    hover: str


def intervals(names: Sequence[str], means: Sequence[Mean], colours: Mapping[str, str]) -> str:
    """A row for each name, in it a point with whiskers for each series, as JSON. colours: of each series."""
    import plotly.graph_objects as go

    series = [one for one in colours if any(mean.series == one for mean in means)]
    figure = go.Figure()
    for number, one in enumerate(series):
        own = [mean for mean in means if mean.series == one]
        aside = _APART * (2 * number - len(series) + 1)
        figure.add_scatter(
            x=[mean.value for mean in own],
            y=[names.index(mean.name) + aside for mean in own],
            error_x=_whiskers(own, colours[one]),
            mode="markers",
            name=plain(one),
            marker={"color": colours[one], "size": 7, "symbol": "circle" if number == 0 else "circle-open"},
            hovertext=[mean.hover for mean in own],
            hoverinfo="text",
        )
    figure.update_layout(
        template="none",
        height=_ROW * len(names) + _TOP + _BOTTOM,
        margin={"l": 8, "r": 16, "t": _TOP, "b": _BOTTOM},
        xaxis={
            "fixedrange": True,
            "tickformat": "~g",
            "nticks": 6,
            "rangemode": "tozero",
            "gridcolor": LINE,
            "zerolinecolor": FAINT,
        },
        yaxis=_rows(names),
        showlegend=len(series) > 1,
        legend={**legend_above(series), "itemclick": False, "itemdoubleclick": False},
        font={"size": 11},
        dragmode=False,
        hovermode="closest",
    )
    return figure_json(figure)


def row_label(name: str) -> str:
    """A row's name, in two lines where it is long, which are cut where they are longer still."""
    first, *rest = textwrap.wrap(printable(name), LONGEST) or [""]
    lines = [first, label(" ".join(rest), LONGEST)] if rest else [first]
    return "<br>".join(map(plain, lines))


def _whiskers(means: Sequence[Mean], colour: str) -> dict[str, Any]:
    above = [0.0 if mean.high is None else mean.high - mean.value for mean in means]
    below = [0.0 if mean.low is None else mean.value - mean.low for mean in means]
    shape = {"color": colour, "thickness": 1.5, "width": 4}
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, **shape}


def _rows(names: Sequence[str]) -> dict[str, Any]:
    return {
        "tickvals": list(range(len(names))),
        "ticktext": [row_label(name) for name in names],
        "range": [len(names) - 0.5, -0.5],
        "fixedrange": True,
        "automargin": True,
        "gridcolor": LINE,
        "zeroline": False,
        "ticks": "",
    }
