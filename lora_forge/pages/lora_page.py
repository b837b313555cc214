"""The page of `inspect --html`: what is in one or several LoRA files, with heat maps and a table of layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_forge.files.names import RECORD_KEY
from lora_forge.inspection.layers import LayerReport
from lora_forge.inspection.places import natural, place_of
from lora_forge.inspection.report import FileReport, Group, counted, own_record, several, shortened
from lora_forge.pages.figures import Chart, hover_text
from lora_forge.pages.heat_maps import Cell, component_maps
from lora_forge.pages.page import render
from lora_forge.pages.tables import Value, number, shown, words

_MOST_ROWS = 5000  # of the table; what has more layers is no LoRA, and would be no page
_MOST_PAIRS = 500  # of metadata
_LONGEST = 2000  # characters of a value


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
        ("format", lora.format),
        ("base model", shortened(str(report.family), 100)),
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
        "norm": shown(group.delta_norm),
        "effective": shown(group.effective_rank, 3),
        "nothing": str(group.nothing or "–"),
    }


def _charts(report: FileReport) -> list[Chart]:
    """A heat map per component for each measure."""
    cells: dict[str, dict[str, list[Cell]]] = {}
    for layer in report.layers[:_MOST_ROWS]:
        place = place_of(layer.component, layer.layer, layer.name)
        broken = any(fault != "does nothing" for fault in layer.faults)
        for measure, value in (("‖ΔW‖", layer.delta_norm), ("effective rank", layer.effective_rank)):
            if value is not None or broken:
                cell = Cell(place, value, _hover(layer), broken)
                cells.setdefault(layer.component or "", {}).setdefault(measure, []).append(cell)
    return component_maps(cells, logarithmic={"‖ΔW‖"})


def _hover(layer: LayerReport) -> str:
    return hover_text(
        [
            shortened(layer.layer or layer.name, 100),
            f"‖ΔW‖ {shown(layer.delta_norm)}, effective rank {shown(layer.effective_rank, 3)}",
            f"{layer.kind}, rank {layer.rank or '–'}, alpha {'–' if layer.alpha is None else f'{layer.alpha:g}'}",
            *(shortened(fault, 100) for fault in layer.faults),
        ]
    )


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
        words(shortened(_path(layer), 200)),
        number(layer.delta_norm),
        number(layer.effective_rank, shown(layer.effective_rank, 3)),
        number(layer.rank, str(layer.rank)),
        number(layer.alpha, f"{layer.alpha:g}" if layer.alpha is not None else ""),
        number(out * inputs if layer.shape else None, f"{out} × {inputs}"),
        words(shortened(layer.kind)),
        words(shortened("; ".join(layer.faults), 300)),
    ]


def _path(layer: LayerReport) -> str:
    return f"{layer.component}.{layer.layer}" if layer.component and layer.layer else layer.name
