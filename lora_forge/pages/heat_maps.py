"""Heat maps of a model's layers: a component each, block by projection."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_forge.inspection.places import OUTSIDE, Place, natural
from lora_forge.inspection.report import shortened
from lora_forge.pages.figures import Chart, figure_json, label, plain

# Viridis without its darkest sixth, which would be lost on a dark page.
COLOURS = ["#443a83", "#31688e", "#21918c", "#35b779", "#90d743", "#fde725"]
NOTHING, BROKEN = "#9a9a9a", "#d1242f"
_MOST_ROWS, _MOST_COLUMNS = 400, 60
_ROW, _CHARACTER, _BELOW = 16, 6, 56  # pixels: a row, a letter of a label, and what the colours take
_SHORTER = {
    "down_blocks": "down",
    "up_blocks": "up",
    "mid_block": "mid",
    "attentions": "att",
    "resnets": "res",
    "transformer_blocks": "tb",
    "downsamplers": "down",
    "upsamplers": "up",
}


@dataclass(frozen=True)
class Cell:
    """A layer of a heat map. value: None where it is not known. broken: whether something is wrong with it."""

    place: Place
    value: float | None
    hover: str
    broken: bool = False


def component_maps(
    cells: Mapping[str, Mapping[str, Sequence[Cell]]], *, logarithmic: Collection[str] = ()
) -> list[Chart]:
    """A chart per component, a view per measure: `{component: {measure: cells}}`.

    logarithmic: the measures whose colours go by the logarithm. A colour means the same in every component.
    """
    spans = {
        measure: colour_range(
            (cell for views in cells.values() for cell in views.get(measure, ())), logarithmic=measure in logarithmic
        )
        for measure in dict.fromkeys(measure for views in cells.values() for measure in views)
    }
    charts = []
    for component in sorted(cells, key=lambda one: (one == "", one)):
        views = [
            (measure, heat_map(shown, span=spans[measure], logarithmic=measure in logarithmic))
            for measure, shown in cells[component].items()
        ]
        title = shortened(component) or "component not known"
        about = f"heat map of its layers, block by projection, by {' or '.join(cells[component])}"
        charts.append(Chart(title, views, about))
    return charts


def colour_range(cells: Iterable[Cell], *, logarithmic: bool) -> tuple[float, float]:
    """The range that several heat maps share, so that a colour means the same in all; of logarithms if so asked."""
    values = [cell.value for cell in cells if cell.value and not cell.broken]
    if not values:
        return (0.0, 1.0)
    low, high = min(values), max(values)
    if logarithmic:
        low, high = math.log10(low), math.log10(high)
    return (low, high) if high - low > 1e-6 else (low - 0.5, high + 0.5)


def heat_map(cells: Sequence[Cell], *, span: tuple[float, float], logarithmic: bool) -> str:
    """One component, block by projection, as JSON. Layers of zero are grey, broken ones red, absent ones left out."""
    import plotly.graph_objects as go

    blocks = sorted({cell.place.block for cell in cells}, key=lambda block: (block == OUTSIDE, natural(block)))
    blocks = blocks[:_MOST_ROWS]
    projections = sorted({cell.place.projection for cell in cells if cell.place.block in set(blocks)}, key=natural)
    projections = projections[:_MOST_COLUMNS]
    rows, columns = _numbered(blocks), _numbered(projections)
    values, nothing, broken, hover = (_grid(len(rows), len(columns)) for _ in range(4))
    for cell in cells:
        row, column = rows.get(cell.place.block), columns.get(cell.place.projection)
        if row is None or column is None:
            continue
        hover[row][column] = cell.hover
        if cell.broken:
            broken[row][column] = 1
        elif cell.value:
            values[row][column] = math.log10(cell.value) if logarithmic else cell.value
        elif cell.value == 0:
            nothing[row][column] = 1
    across, down = [label(one) for one in projections], [label(_short(one)) for one in blocks]
    axes = {"x": [plain(one) for one in across], "y": [plain(one) for one in down]}
    common = axes | {"text": hover, "hovertemplate": "%{text}<extra></extra>", "xgap": 1, "ygap": 1}
    colours = {
        "colorscale": COLOURS,
        "zmin": span[0],
        "zmax": span[1],
        "colorbar": _colour_bar(span, logarithmic),
    }
    flat = {"showscale": False, "zmin": 0, "zmax": 1}
    figure = go.Figure(
        [
            go.Heatmap(z=values, **colours, **common),
            go.Heatmap(z=nothing, colorscale=[[0, NOTHING], [1, NOTHING]], **flat, **common),
            go.Heatmap(z=broken, colorscale=[[0, BROKEN], [1, BROKEN]], **flat, **common),
        ]
    )
    axis = {"type": "category", "showgrid": False, "zeroline": False, "ticks": "", "dtick": 1}
    below = _BELOW if any(value is not None for row in values for value in row) else 8
    above = 14 + _CHARACTER * max(map(len, across), default=0)
    beside = 14 + _CHARACTER * max(map(len, down), default=0)
    figure.update_layout(
        template="none",
        height=_ROW * len(blocks) + above + below,
        margin={"l": beside, "r": 8, "t": above, "b": below},
        xaxis={**axis, "side": "top", "tickangle": -90},
        yaxis={**axis, "autorange": "reversed"},
        font={"size": 11},
    )
    return figure_json(figure)


def _numbered(names: Sequence[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


def _grid(rows: int, columns: int) -> list[list[Any]]:
    return [[None] * columns for _ in range(rows)]


def _colour_bar(span: tuple[float, float], logarithmic: bool) -> dict[str, Any]:
    """Along the bottom edge, which leaves a phone's width to the map."""
    bar: dict[str, Any] = {"orientation": "h", "thickness": 10, "y": 0, "yref": "container", "yanchor": "bottom"}
    bar |= {"ticklabeloverflow": "allow", "xpad": 24}
    if logarithmic:
        ticks = [span[0] + (span[1] - span[0]) * (0.001 + 0.998 * step / 4) for step in range(5)]
        bar |= {"tickvals": ticks, "ticktext": [f"{10**tick:.3g}" for tick in ticks]}
    return bar


def _short(block: str) -> str:
    return ".".join(_SHORTER.get(part, part) for part in block.split("."))
