"""Bars that lie, one below the other: their names have room beside them, on a phone too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_forge.pages.figures import FAINT, LINE, PAPER, figure_json, label, legend_above, plain

_ROW, _TOP, _BOTTOM, _LEGEND = 22, 8, 30, 30  # pixels
_LONGEST = 26  # letters of a name: half of a phone's width
_TINY = {"size": 10}


@dataclass(frozen=True)
class Bar:
    """One bar. series: what it is one of; each has a colour of its own, and a place in the legend."""

    name: str
    value: float
    hover: str
    series: str = ""


def bars(
    rows: Sequence[Bar],
    colours: Mapping[str, str],
    *,
    percent: bool = False,
    mark: tuple[str, float] | None = None,
    legend: bool = True,
) -> str:
    """Bars from the top down, as JSON; numbers are not negative.

    colours: of each series, as `figures` has them. percent: values are shares. mark: the name and value of a line
    across all bars. legend: whether several series have one.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    for series, colour in colours.items():
        places = [place for place, bar in enumerate(rows) if bar.series == series]
        if places:
            figure.add_bar(
                orientation="h",
                name=plain(series),
                y=places,
                x=[rows[place].value for place in places],
                hovertext=[rows[place].hover for place in places],
                hoverinfo="text",
                marker={"color": colour},
            )
    legend = legend and len({bar.series for bar in rows}) > 1
    above, below = _TOP + _LEGEND * legend, _BOTTOM + 14 * (mark is not None)
    figure.update_layout(
        template="none",
        barmode="overlay",
        bargap=0.25,
        height=_ROW * len(rows) + above + below,
        margin={"l": 8, "r": 8, "t": above, "b": below},
        xaxis=_values(max((bar.value for bar in rows), default=0.0) or 1.0, percent),
        yaxis=_names(rows),
        showlegend=legend,
        legend={**legend_above(colours), "itemclick": False, "itemdoubleclick": False},
        annotations=[_number(place, bar.value, percent) for place, bar in enumerate(rows)],
        font={"size": 11},
        dragmode=False,
        hovermode="closest",
    )
    if mark is not None:
        name, value = mark
        figure.add_vline(x=value, line={"color": FAINT, "width": 1.5, "dash": "dash"})
        below_axis = {"y": 0, "yref": "paper", "yanchor": "top", "yshift": -16}
        figure.add_annotation(x=value, text=plain(name), showarrow=False, font=_TINY, **below_axis)
    return figure_json(figure)


def _number(place: int, value: float, percent: bool) -> dict[str, Any]:
    """The number at a bar's end, on paper of its own, so that no line is drawn through it."""
    text = f"{value:.1%}" if percent else f"{value:.3g}"
    at = {"x": value, "y": place, "xanchor": "left", "xshift": 3}
    return {**at, "text": text, "showarrow": False, "font": _TINY, "bgcolor": PAPER, "borderpad": 0}


def _values(largest: float, percent: bool) -> dict[str, Any]:
    """The axis of values, with room for the number at the longest bar's end."""
    return {
        "range": [0, 1.3 * largest],
        "fixedrange": True,
        "tickformat": ".0%" if percent else "~g",
        "nticks": 5,
        "gridcolor": LINE,
        "zeroline": True,
        "zerolinecolor": FAINT,
    }


def _names(rows: Sequence[Bar]) -> dict[str, Any]:
    return {
        "tickvals": list(range(len(rows))),
        "ticktext": [plain(label(bar.name, _LONGEST)) for bar in rows],
        "range": [len(rows) - 0.5, -0.5],
        "fixedrange": True,
        "automargin": True,
        "showgrid": False,
        "zeroline": False,
        "ticks": "",
    }
