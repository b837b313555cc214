"""A heat map of shares, row by column: blue towards 1, orange below 0."""

from __future__ import annotations

from collections.abc import Sequence

from lora_forge.pages.figures import figure_json, label, plain
from lora_forge.pages.intervals import LONGEST, row_label

_COLOURS = [[0.0, "#e08a4a"], [0.5, "#f1efec"], [1.0, "#5aa3d0"]]
_ROW, _CHARACTER = 30, 6  # pixels: a row, a letter of a label


def cross_map(
    rows: Sequence[str],
    columns: Sequence[str],
    shares: Sequence[Sequence[float | None]],
    hover: Sequence[Sequence[str]],
) -> str:
    """The map, as JSON. Colours end at -1 and 1; what is None is left out."""
    import plotly.graph_objects as go

    across, down = [plain(label(name, LONGEST)) for name in columns], [row_label(name) for name in rows]
    figure = go.Figure(
        go.Heatmap(
            z=[list(row) for row in shares],
            x=list(range(len(columns))),
            y=list(range(len(rows))),
            text=[["" if value is None else f"{value:.2f}" for value in row] for row in shares],
            texttemplate="%{text}",
            textfont={"color": "#1c1f24"},
            hovertext=[list(row) for row in hover],
            hoverinfo="text",
            hoverongaps=False,
            colorscale=_COLOURS,
            zmin=-1,
            zmax=1,
            showscale=False,
            xgap=1,
            ygap=1,
        )
    )
    axis = {"showgrid": False, "zeroline": False, "ticks": "", "fixedrange": True}
    above, beside = (14 + _CHARACTER * min(LONGEST, max(map(len, names), default=0)) for names in (columns, rows))
    figure.update_layout(
        template="none",
        height=_ROW * len(rows) + above + 10,
        margin={"l": beside, "r": 8, "t": above, "b": 10},
        xaxis={**axis, "side": "top", "tickangle": -90, "tickvals": list(range(len(columns))), "ticktext": across},
        yaxis={**axis, "autorange": "reversed", "tickvals": list(range(len(rows))), "ticktext": down},
        font={"size": 11},
        dragmode=False,
    )
    return figure_json(figure)
