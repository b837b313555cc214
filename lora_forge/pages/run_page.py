"""The report of a run: what was asked, how the objective went, and what the LoRA does to the model."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_forge.effect.tokens import TokenShift
from lora_forge.errors import printable
from lora_forge.files.deltas import norm_and_rank
from lora_forge.files.names import RECORD_KEY
from lora_forge.inspection.places import natural, place_of
from lora_forge.inspection.report import plugin_text, shortened, term_text, value_text
from lora_forge.pages.bars import Bar, bars
from lora_forge.pages.figures import SERIES, Chart, hover_text
from lora_forge.pages.heat_maps import Cell, component_maps
from lora_forge.pages.lines import Line, lines
from lora_forge.pages.page import render
from lora_forge.pages.tables import Value, number, shown, words
from lora_forge.pages.token_bars import token_charts
from lora_forge.result import RunResult, Values

_TOGETHER = "all together"


def run_page(result: RunResult, tokens: Sequence[TokenShift] = (), preview: bytes | None = None) -> str:
    """The page, as HTML.

    tokens: what `token_shifts` gave for this prompt. preview: a PNG.
    """
    record = json.loads(result.metadata.get(RECORD_KEY, "{}"))
    layers = list(_layers(result))
    return render(
        "run.html",
        title=shortened(result.run.prompt, 200),
        asked=list(_asked(result, record.get("run", {}))),
        made=list(_made(result, record, layers)),
        warnings=[printable(warning) for warning in result.warnings],
        preview=base64.b64encode(preview).decode("ascii") if preview else None,
        objective=_objective(result),
        losses=_losses(result.steps),
        components=_components(result),
        maps=_maps(layers),
        parts_moved=_parts(result),
        shifts=_shifts(result),
        tokens=token_charts(tokens),
        columns=_COLUMNS,
        rows=[_row(layer) for layer in sorted(layers, key=lambda layer: natural(layer.path))],
        usage="\n".join(map(printable, result.usage.split("\n"))),
        record=_legible(record),
    )


def _asked(result: RunResult, run: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What was asked for, as label and text."""
    rows = [
        ("prompt", result.run.prompt),
        ("second prompt", run.get("prompt_2")),
        ("model", result.run.model),
        ("base model", run.get("base_model")),
        ("seed", result.run.seed),
        ("rank, alpha", f"{result.rank}, {result.alpha:g}"),
        ("iterations", result.run.iterations),
        *_early(result),
        ("objective", " + ".join(map(term_text, run.get("loss", ())))),
        ("L2", run.get("l2")),
        ("optimizer", plugin_text(run.get("optimizer", {}))),
        ("initializer", plugin_text(run.get("initializer", {}))),
        ("started from", run.get("init_from")),
        ("dtype", run.get("dtype")),
        ("saved as", run.get("dtype_out")),
        ("target shift", run.get("target_shift")),
    ]
    return ((label, shortened(value_text(value), 1000)) for label, value in rows if value not in (None, ""))


def _early(result: RunResult) -> Iterator[tuple[str, Any]]:
    """Which weights were kept, where they are not those of the last iteration."""
    if result.updates != result.run.iterations:
        yield "kept", f"the weights after {result.updates} steps, of {len(result.steps)} taken"


def _made(result: RunResult, record: Mapping[str, Any], layers: Sequence[_Layer]) -> Iterator[tuple[str, str]]:
    """What came of it."""
    nothing = sum(layer.norm == 0 for layer in layers)
    rows = [
        ("written", ", ".join(map(str, result.files)) or "nothing: no output was asked for"),
        ("layers", f"{len(layers)}, of which {nothing} do nothing" if nothing else str(len(layers))),
        ("left out of the file", f"{len(result.dropped)} inert layers" if result.dropped else None),
        ("added to the file", f"{len(result.padded)} layers of zeros" if result.padded else None),
        ("strength", result.strength),
        ("largest rounding error", f"{result.rounding:.3g} of a layer's ‖ΔW‖" if result.rounding else None),
        ("time", ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in result.seconds.items())),
        ("device", record.get("device")),
        ("versions", ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())),
    ]
    return ((label, shortened(value_text(value), 1000)) for label, value in rows if value not in (None, ""))


def _objective(result: RunResult) -> list[tuple[str, str, str, str]]:
    """Term, before, after and change; the total last."""

    def row(name: str, before: float, after: float) -> tuple[str, str, str, str]:
        return shortened(name), shown(before, 6), shown(after, 6), f"{after - before:+.3g}"

    before, after = result.before, result.after
    terms = [row(name, before.terms[name], after.terms[name]) for name in after.terms]
    return [*terms, row("L2", before.l2, after.l2), row("total", before.loss, after.loss)]


def _losses(steps: Sequence[Values]) -> Chart | None:
    """The total, each term and L2 before each update: as they are, and since the first step."""
    if not steps:
        return None
    values = {"total": [one.loss for one in steps]}
    values |= {shortened(name): [one.terms[name] for one in steps] for name in steps[0].terms}
    values["L2"] = [one.l2 for one in steps]
    views = [
        ("change", lines([Line(name, [one - own[0] for one in own]) for name, own in values.items()], axis="change")),
        ("value", lines([Line(name, own) for name, own in values.items()], axis="value")),
    ]
    told = ", ".join(f"{name} from {shown(own[0])} to {shown(own[-1])}" for name, own in values.items())
    return Chart("the objective over the steps", views, f"lines over {len(steps)} steps: {told}")


def _components(result: RunResult) -> list[tuple[str, str, str, str, str, str]]:
    return [
        (
            shortened(one.component),
            str(one.layers),
            str(one.inert or "–"),
            shown(one.delta_norm),
            shown(one.largest_relative_change, 3),
            shortened(one.largest_layer or "", 200),
        )
        for one in result.effect.components
    ]


@dataclass(frozen=True)
class _Layer:
    """norm: ‖ΔW‖. rank: the effective one. shape: (out, in)."""

    component: str
    layer: str
    norm: float
    rank: float | None
    shape: tuple[int, int]
    remarks: tuple[str, ...]

    @property
    def path(self) -> str:
        return f"{self.component}.{self.layer}"


def _layers(result: RunResult) -> Iterator[_Layer]:
    inert, dropped = set(result.inert), set(result.dropped)
    for component, layers in result.weights.items():
        for layer, pair in layers.items():
            down, up = (pair[name].float().numpy() for name in ("lora_A", "lora_B"))
            norm, rank = norm_and_rank("lora", {"down": down, "up": up}, result.alpha / result.rank)
            remarks = {
                "does nothing": norm == 0,
                "out of the objective's reach": f"{component}.{layer}" in inert,
                "not in the file": f"{component}.{layer}" in dropped,
            }
            told = tuple(text for text, true in remarks.items() if true)
            yield _Layer(component, layer, norm or 0.0, rank, (up.shape[0], down.shape[1]), told)


def _maps(layers: Sequence[_Layer]) -> list[Chart]:
    cells: dict[str, dict[str, list[Cell]]] = {}
    for layer in layers:
        hover = hover_text(
            [
                shortened(layer.layer, 100),
                f"‖ΔW‖ {shown(layer.norm)}, effective rank {shown(layer.rank, 3)}",
                *layer.remarks,
            ]
        )
        place = place_of(layer.component, layer.layer, layer.layer)
        views = cells.setdefault(layer.component, {})
        views.setdefault("‖ΔW‖", []).append(Cell(place, layer.norm, hover))
        views.setdefault("effective rank", []).append(Cell(place, layer.rank, hover))
    return component_maps(cells, logarithmic={"‖ΔW‖"})


def _parts(result: RunResult) -> list[tuple[str, str, str]]:
    """Part of the conditioning, relative shift, cosine."""
    effect = result.effect
    rows = [(shortened(one.name), shown(one.relative), f"{one.cosine:.6f}") for one in effect.shifts]
    return [*rows, (_TOGETHER, shown(effect.conditioning_shift), "")] if rows else []


def _shifts(result: RunResult) -> Chart | None:
    effect = result.effect
    if effect.conditioning_shift is None:
        return None
    rows = [
        Bar(
            shortened(one.name),
            one.relative,
            hover_text([shortened(one.name), f"relative shift {shown(one.relative)}", f"cosine {one.cosine:.6f}"]),
            "part",
        )
        for one in effect.shifts
    ]
    hover = hover_text([_TOGETHER, f"relative shift {shown(effect.conditioning_shift)}"])
    rows.append(Bar(_TOGETHER, effect.conditioning_shift, hover, _TOGETHER))
    figure = bars(rows, {"part": SERIES[0], _TOGETHER: SERIES[1]}, legend=False)
    return Chart("relative shift by part", [("", figure)], "bars of the numbers in the table above")


_COLUMNS = (
    ("layer", "text"),
    ("‖ΔW‖", "number"),
    ("effective rank", "number"),
    ("out × in", "number"),
    ("remarks", "text"),
)


def _row(layer: _Layer) -> list[Value]:
    out, inputs = layer.shape
    return [
        words(shortened(layer.path, 200)),
        number(layer.norm),
        number(layer.rank, shown(layer.rank, 3)),
        number(out * inputs, f"{out} × {inputs}"),
        words("; ".join(layer.remarks)),
    ]


def _legible(record: Mapping[str, Any]) -> str:
    """A record in lines, whatever it holds."""
    return "\n".join(map(printable, json.dumps(record, indent=2, ensure_ascii=False, sort_keys=True).split("\n")))
