"""Lines over the steps of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_forge.pages.figures import FAINT, LINE, SERIES, figure_json, legend_above, plain

DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")  # who cannot tell colours apart tells these
FEW = 12  # points that are shown as such


@dataclass(frozen=True)
class Line:
    """A value at each step, the first of which is step 1."""

    name: str
    values: Sequence[float]


def lines(shown: Sequence[Line], *, axis: str) -> str:
    """Lines over steps, as JSON. axis: what the values are."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for number, line in enumerate(shown):
        figure.add_scatter(
            x=list(range(1, len(line.values) + 1)),
            y=list(line.values),
            name=plain(line.name),
            mode="lines+markers" if len(line.values) <= FEW else "lines",
            line={"color": SERIES[number % len(SERIES)], "dash": DASHES[number % len(DASHES)], "width": 2},
            marker={"size": 4},
            hovertemplate="%{y:.6~g}",
        )
    figure.update_layout(
        height=360,
        margin={"l": 8, "r": 12, "t": 36, "b": 40},
        legend=legend_above(line.name for line in shown),
        **over_steps(axis),
    )
    return figure_json(figure)


def over_steps(axis: str) -> dict[str, Any]:
    """The layout of values over steps. axis: what the values are."""
    return {
        "template": "none",
        "xaxis": {"title": {"text": "step", "standoff": 6}, "tickformat": "d", "gridcolor": LINE, "zeroline": False},
        "yaxis": {
            "title": {"text": plain(axis), "standoff": 8},
            "tickformat": "~g",
            "gridcolor": LINE,
            "zerolinecolor": FAINT,
            "automargin": True,
        },
        "showlegend": True,
        "font": {"size": 11},
        "hovermode": "x unified",
    }
