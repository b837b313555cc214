"""The page of `inspect --html`: what is in one or several LoRA files, with heat maps and a table of layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_forge.files.names import RECORD_KEY
from lora_forge.inspection.layers import LayerReport
from lora_forge.inspection.places import natural, place_of
from lora_forge.inspection.report import FileReport, Group, counted, own_record, several, shortened
from lora_forge.pages.figures import Cell, colour_range, heat_map, plain
from lora_forge.pages.page import render

_MOST_ROWS = 5000  # of the table; what has more layers is no LoRA, and would be no page
_MOST_PAIRS = 500  # of metadata
_LONGEST = 2000  # characters of a value


@dataclass(frozen=True)
class Chart:
    """A component's heat maps: `views` has one figure as JSON for each label."""

    title: str
    views: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Value:
    """A cell of the table: what it shows, and what it is sorted by."""

    text: str
    key: float | str


def lora_page(reports: Sequence[FileReport]) -> str:
    """The page, as HTML."""
    title = f"{len(reports)} LoRA files" if len(reports) > 1 else f"LoRA: {reports[0].lora.path.name}"
    return render("lora.html", title=shortened(title, 100), files=[_file(report) for report in reports])


def _file(report: FileReport) -> dict[str, Any]:
    lora = report.lora
    record = own_record(lora.metadata)
    metadata = [
        (shortened(key, 100), shortened(text, _LONGEST))
        for key, text in lora.metadata.items()
        if key != RECORD_KEY or not record
    ]
    return {
        "name": shortened(lora.path.name, 100),
        "facts": _facts(report),
        "components": [_component(group) for group in report.components],
        "faults": report.faults[:100],
        "more_faults": max(0, len(report.faults) - 100),
        "record": record,
        "metadata": metadata[:_MOST_PAIRS],
        "more_metadata": max(0, len(metadata) - _MOST_PAIRS),
        "charts": _charts(report) if report.measured else [],
        "columns": _COLUMNS,
        "rows": [_row(layer) for layer in sorted(report.layers[:_MOST_ROWS], key=lambda layer: natural(_path(layer)))],
        "more_rows": max(0, len(report.layers) - _MOST_ROWS),
        "measured": report.measured,
    }


def _facts(report: FileReport) -> list[tuple[str, str]]:
    lora = report.lora
    size = f"{lora.size / 10**6:.1f} MB" if lora.size >= 10**6 else f"{lora.size} bytes"
    nothing = sum(layer.does_nothing for layer in report.layers)
    rows = [
        ("format", "none: no LoRA layer in it" if lora.format == "none" else lora.format),
        ("base model", lora.family or "not known"),
        ("size", size),
        ("numbers", ", ".join(f"{dtype} (×{count})" for dtype, count in report.dtypes.items()) or "none"),
        ("layers", str(len(report.layers))),
    ]
    if report.measured:
        rows.append(("do nothing", f"{nothing} layers" if nothing else "none"))
    if lora.unknown:
        rows.append(("unknown keys", f"{len(lora.unknown)}: {several(lora.unknown, 20)}"))
    return rows


def _component(group: Group) -> dict[str, str]:
    return {
        "component": shortened(group.component) or "not known",
        "layers": str(group.layers),
        "kind": counted(group.kinds, shortened),
        "rank": counted(group.ranks, lambda rank: "none" if rank is None else str(rank)),
        "alpha": counted(group.alphas, lambda alpha: "none" if alpha is None else f"{alpha:g}"),
        "norm": _shown(group.delta_norm),
        "effective": _shown(group.effective_rank, 3),
        "nothing": str(group.nothing or "–"),
    }


def _charts(report: FileReport) -> list[Chart]:
    """A heat map per component for each measure, with one range of colours for all components."""
    measures = {"‖ΔW‖": (True, "delta_norm"), "effective rank": (False, "effective_rank")}
    cells: dict[str, dict[str, list[Cell]]] = {}
    for layer in report.layers[:_MOST_ROWS]:
        place = place_of(layer.component, layer.layer, layer.name)
        broken = any(fault != "does nothing" for fault in layer.faults)
        for measure, (_, attribute) in measures.items():
            value = getattr(layer, attribute)
            cell = Cell(place, value, _hover(layer), broken)
            if value is not None or broken:
                cells.setdefault(layer.component or "", {}).setdefault(measure, []).append(cell)
    spans = {
        measure: colour_range(
            (cell for one in cells.values() for cell in one.get(measure, ())), logarithmic=logarithmic
        )
        for measure, (logarithmic, _) in measures.items()
    }
    charts = []
    for component in sorted(cells, key=lambda one: (one == "", one)):
        views = [
            (name, heat_map(shown, span=spans[name], logarithmic=measures[name][0]))
            for name, shown in cells[component].items()
        ]
        charts.append(Chart(shortened(component) or "component not known", views))
    return charts


def _hover(layer: LayerReport) -> str:
    lines = [
        shortened(layer.layer or layer.name, 100),
        f"‖ΔW‖ {_shown(layer.delta_norm)}, effective rank {_shown(layer.effective_rank, 3)}",
        f"{layer.kind}, rank {layer.rank or '–'}, alpha {'–' if layer.alpha is None else f'{layer.alpha:g}'}",
        *(shortened(fault, 100) for fault in layer.faults),
    ]
    return "<br>".join(plain(line) for line in lines)


_COLUMNS = (
    ("layer", "text"),
    ("‖ΔW‖", "number"),
    ("effective rank", "number"),
    ("rank", "number"),
    ("alpha", "number"),
    ("out × in", "number"),
    ("kind", "text"),
    ("remarks", "text"),
)


def _row(layer: LayerReport) -> list[Value]:
    out, inputs = layer.shape or (0, 0)
    return [
        _words(shortened(_path(layer), 200)),
        _number(layer.delta_norm, _shown(layer.delta_norm)),
        _number(layer.effective_rank, _shown(layer.effective_rank, 3)),
        _number(layer.rank, str(layer.rank)),
        _number(layer.alpha, f"{layer.alpha:g}" if layer.alpha is not None else ""),
        _number(out * inputs if layer.shape else None, f"{out} × {inputs}"),
        _words(shortened(layer.kind)),
        _words(shortened("; ".join(layer.faults), 300)),
    ]


def _path(layer: LayerReport) -> str:
    return f"{layer.component}.{layer.layer}" if layer.component and layer.layer else layer.name


def _words(text: str) -> Value:
    return Value(text, text)


def _number(value: float | None, text: str) -> Value:
    return Value("–", "") if value is None else Value(text, float(value))


def _shown(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}g}"
