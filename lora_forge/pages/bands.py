"""Curves over steps, each with a band around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_forge.pages.figures import SERIES, figure_json, label, plain
from lora_forge.pages.lines import DASHES, FEW, over_steps

_NAME = 18  # pixels that a name takes in the legend, where each has a row of its own


@dataclass(frozen=True)
class Band:
    """A mean at each of some steps. low, high: the band's edges, None where there is none."""

    name: str
    steps: Sequence[int]
    mean: Sequence[float]
    low: Sequence[float] | None
    high: Sequence[float] | None


def bands(shown: Sequence[Band], *, axis: str) -> str:
    """Curves, as JSON. axis: what the values are. A press on a name hides its curve with its band."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for number, one in enumerate(shown):
        colour = SERIES[number % len(SERIES)]
        steps, group = list(one.steps), str(number)
        if one.low is not None and one.high is not None:
            figure.add_scatter(
                x=[*steps, *reversed(steps)],
                y=[*one.high, *reversed(one.low)],
                mode="none",
                fill="toself",
                fillcolor=colour,
                opacity=0.12,
                hoverinfo="skip",
                showlegend=False,
                legendgroup=group,
            )
        figure.add_scatter(
            x=steps,
            y=list(one.mean),
            name=plain(label(one.name)),
            legendgroup=group,
            mode="lines+markers" if len(steps) <= FEW else "lines",
            line={
                "color": colour,
                "dash": DASHES[(number + number // len(SERIES)) % len(DASHES)],
                "width": 2,
            },
            marker={"size": 4},
            hovertemplate="%{y:.4~g}",
        )
    figure.update_layout(
        height=360 + _NAME * len(shown),
        margin={"l": 8, "r": 12, "t": 12, "b": 40},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": -0.16, "yanchor": "top", "traceorder": "normal"},
        **over_steps(axis),
    )
    return figure_json(figure)
