"""Lines over the steps of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_forge.pages.figures import FAINT, LINE, SERIES, figure_json, legend_above, plain

_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")  # who cannot tell colours apart tells these
_FEW = 12  # points that are shown as such


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
            mode="lines+markers" if len(line.values) <= _FEW else "lines",
            line={"color": SERIES[number % len(SERIES)], "dash": _DASHES[number % len(_DASHES)], "width": 2},
            marker={"size": 4},
            hovertemplate="%{y:.6~g}",
        )
    figure.update_layout(
        template="none",
        height=360,
        margin={"l": 8, "r": 12, "t": 36, "b": 40},
        xaxis={"title": {"text": "step", "standoff": 6}, "tickformat": "d", "gridcolor": LINE, "zeroline": False},
        yaxis={
            "title": {"text": plain(axis), "standoff": 8},
            "tickformat": "~g",
            "gridcolor": LINE,
            "zerolinecolor": FAINT,
            "automargin": True,
        },
        showlegend=True,
        legend=legend_above(line.name for line in shown),
        font={"size": 11},
        hovermode="x unified",
    )
    return figure_json(figure)
