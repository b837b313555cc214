"""`inspect` on a terminal. Everything of a file is put there as text, never as markup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from lora_forge.files.names import RECORD_KEY
from lora_forge.inspection.layers import LayerReport
from lora_forge.inspection.report import FileReport, Group, counted, own_record, several, shortened

_ROWS = 20  # of metadata, and of faults


def print_report(report: FileReport, *, every_layer: bool) -> None:
    """What is in one file: all of it in a few tables, or every layer too."""
    console = Console()
    console.print(Text(report.name, style="bold"), soft_wrap=True)
    console.print(_facts(report))
    if report.layers:
        console.print(_components(report))
    if report.measured and report.layers:
        console.print(_every_layer(report.layers) if every_layer else _regions(report.regions))
    elif every_layer and report.layers:
        console.print(_every_layer(report.layers))
    record = own_record(report.lora.metadata)
    if record:
        console.print(_pairs(record, "the run that made it"))
    metadata = [(key, text) for key, text in report.lora.metadata.items() if key != RECORD_KEY or not record]
    if metadata:
        console.print(_metadata(metadata, all_of_it=every_layer))
    for fault in report.faults[: None if every_layer else _ROWS]:
        console.print(Text.assemble(("wrong: ", "yellow"), fault), soft_wrap=not console.is_terminal)
    if len(report.faults) > _ROWS and not every_layer:
        console.print(Text(f"and {len(report.faults) - _ROWS} more that are wrong; --layers lists them"))
    console.print()


def _facts(report: FileReport) -> Table:
    lora = report.lora
    rows = [
        ("format", "none: there is no LoRA layer in it" if lora.format == "none" else lora.format),
        ("base model", str(report.family)),
        ("size", size_text(lora.size)),
        ("numbers", ", ".join(f"{dtype} (×{count})" for dtype, count in report.dtypes.items()) or "none"),
    ]
    nothing = sum(layer.does_nothing for layer in report.layers)
    if report.measured and nothing:
        rows.append(("do nothing", f"{nothing} of {len(report.layers)} layers: their ΔW is zero"))
    if not report.measured:
        rows.append(("not read", "tensors: alpha, ‖ΔW‖ and effective rank are in them"))
    if lora.unknown:
        rows.append(("unknown keys", f"{len(lora.unknown)}: {several(lora.unknown)}"))
    return _pairs(rows)


def size_text(size: int) -> str:
    """Bytes, and megabytes where there are any."""
    return f"{size} bytes" if size < 10**6 else f"{size / 10**6:.1f} MB"


def alpha_text(alpha: float | None) -> str:
    return "none" if alpha is None else f"{alpha:g}"


def _components(report: FileReport) -> Table:
    groups = report.components
    table = Table(Column("component", no_wrap=True), "layers", "kind", "rank", "alpha")
    if report.measured:
        for name in ("‖ΔW‖", "effective\nrank"):
            table.add_column(name, no_wrap=name == "‖ΔW‖")
    for group in groups:
        measured = (number(group.delta_norm), number(group.effective_rank, 3))
        table.add_row(
            Text(shortened(group.component) or "not known"),
            str(group.layers),
            Text(counted(group.kinds, shortened)),
            counted(group.ranks, lambda rank: "none" if rank is None else str(rank)),
            counted(group.alphas, alpha_text) if report.measured else "not read",
            *(measured if report.measured else ()),
        )
    return table


def _regions(groups: Sequence[Group]) -> Table:
    table = Table(Column("component", no_wrap=True), Column("blocks", overflow="fold", min_width=13), "layers")
    for name in ("‖ΔW‖", "effective\nrank", "do\nnothing"):
        table.add_column(name, no_wrap=name == "‖ΔW‖")
    before = None
    for group in groups:
        if before is not None and before != group.component:
            table.add_section()
        table.add_row(
            Text(shortened(group.component, 40) if before != group.component else ""),
            Text(shortened(group.region, 60)),
            str(group.layers),
            number(group.delta_norm),
            number(group.effective_rank, 3),
            str(group.nothing or "–"),
        )
        before = group.component
    return table


def _every_layer(layers: Iterable[LayerReport]) -> Table:
    table = Table("component", Column("layer", overflow="fold"), "kind", "rank", "alpha", "[out, in]", "‖ΔW‖")
    table.add_column("effective rank")
    table.add_column("wrong", overflow="fold")
    for layer in layers:
        table.add_row(
            Text(shortened(layer.component or "–")),
            Text(shortened(layer.layer or layer.name, 200)),
            Text(shortened(layer.kind)),
            "–" if layer.rank is None else str(layer.rank),
            "–" if layer.alpha is None else f"{layer.alpha:g}",
            Text(str(list(layer.shape)) if layer.shape else "–"),
            number(layer.delta_norm),
            number(layer.effective_rank, 3),
            Text("; ".join(layer.faults)),
        )
    return table


def _metadata(metadata: Sequence[tuple[str, str]], *, all_of_it: bool) -> Table:
    shown = metadata if all_of_it else metadata[:_ROWS]
    rows = [(shortened(key, 60), text if all_of_it and text.isprintable() else shortened(text)) for key, text in shown]
    if len(metadata) > len(shown):
        rows.append(("…", f"{len(metadata) - len(shown)} more; --layers or --json have all"))
    return _pairs(rows, "metadata")


def _pairs(rows: Iterable[tuple[str, str]], title: str | None = None) -> Table:
    table = Table(show_header=False, title=title, title_justify="left")
    table.add_column(style="dim", overflow="fold", ratio=None)
    table.add_column(overflow="fold")
    for label, text in rows:
        table.add_row(Text(label), Text(text))
    return table


def number(value: float | None, digits: int = 4) -> str:
    """A measured number; `–` for one that is not known."""
    return "–" if value is None else f"{value:.{digits}g}"
