"""The report of a comparison: what differs beyond noise, and every number that says so."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_forge.comparison.results import Header, Results
from lora_forge.comparison.statistics import Interval, Paired
from lora_forge.comparison.summary import OWN, ObjectiveSummary, summarize
from lora_forge.comparison.verdicts import CONDITIONING, interval_text, label_of, verdicts, worded
from lora_forge.inspection.report import several, shortened
from lora_forge.pages.compare_charts import cross_chart, curve_chart, interval_chart
from lora_forge.pages.compare_images import images_of
from lora_forge.pages.page import render
from lora_forge.pages.tables import shown

_MOST_INERT = 200  # layers that are named

Cells = tuple[str, ...]
Columns = Sequence[tuple[str, str]]  # their names and kinds


def compare_page(results: Results, folder: Path | None = None) -> str:
    """The page, as HTML. folder: where the results' images are. Raises UsageError where scipy is missing."""
    summary = summarize(results)
    objectives = summary.objectives
    first = shortened(objectives[0].name) if objectives else ""
    return render(
        "compare.html",
        title=f"{len(objectives)} objectives on {results.header.model}",
        facts=[(label, shortened(text, 300)) for label, text in _facts(results.header) if text],
        verdicts=verdicts(summary),
        formulas=_formulas(objectives),
        objectives=[_objective(one) for one in objectives],
        objective_columns=_OBJECTIVE,
        glance_columns=_GLANCE,
        glance=[_glance(one) for one in objectives],
        cost_columns=_COST,
        costs=[_cost(one) for one in objectives],
        shift_columns=_SHIFTS,
        shifts=[row for one in objectives for row in _shifts(one)],
        intervals=interval_chart(objectives),
        test_columns=_TESTS,
        random_tests=[
            row
            for measure in ("conditioning_shift", "specificity", OWN)
            for row in _tests({one.name: one.against_random for one in objectives}, measure)
        ],
        first=first,
        tests=_against_first(objectives, crossed=False),
        cross_tests=_against_first(objectives, crossed=True),
        cross=cross_chart(objectives),
        cross_columns=[("trained", "text"), *((shortened(one.name), "number") for one in objectives)],
        cross_rows=[_cross(one) for one in objectives],
        curves=curve_chart(objectives),
        reach_columns=_reach_columns(objectives),
        reach_rows=_reach(objectives),
        inert=list(_inert(objectives)),
        errors=[
            (shortened(one.name), str(count), shortened(error, 300))
            for one in objectives
            for error, count in one.errors.items()
        ],
        images=images_of(results, folder),
        settings=_legible(results.header.settings),
    )


def _facts(header: Header) -> Iterator[tuple[str, str]]:
    budget = [f"{header.iterations} iterations"] if header.iterations is not None else []
    budget += [f"{header.seconds:g} seconds"] if header.seconds is not None else []
    yield "model", header.model
    yield "base model", header.base_model if header.base_model != header.model else ""
    yield "LoRAs of each objective", f"{header.prompts} prompts × {len(header.seeds)} seeds"
    yield "budget of each", " or ".join(budget)
    yield "control prompts", str(len(header.controls))
    yield "paraphrases", several(header.paraphrases)
    yield "threads", str(header.threads)
    yield "versions", ", ".join(f"{name} {version}" for name, version in header.versions.items())


_OBJECTIVE = (
    ("objective", "text"),
    ("own value before", "number"),
    ("its change", "number"),
    ("conditioning shift", "number"),
    ("specificity", "number"),
    ("‖ΔW‖", "number"),
    ("effective rank", "number"),
)


def _objective(one: ObjectiveSummary) -> Cells:
    measures = one.measures
    return (
        _breaking(one.name),
        _mean(measures["own_before"]),
        interval_text(measures[OWN], signed=True),
        *(interval_text(measures[name]) for name in ("conditioning_shift", "specificity")),
        *(interval_text(measures[name]) for name in ("delta_norm", "effective_rank")),
    )


_COST = (
    ("objective", "text"),
    ("LoRAs", "number"),
    ("steps", "number"),
    ("ms per step", "number"),
    ("seconds", "number"),
    ("MB at most", "number"),
)


def _cost(one: ObjectiveSummary) -> Cells:
    return (
        _breaking(one.name),
        f"{one.runs} ({one.failed} failed)" if one.failed else str(one.runs),
        _mean(one.measures["iterations"]),
        _mean(one.measures["seconds_per_step"], scale=1000),
        _mean(one.measures["seconds"]),
        "–" if one.peak_memory is None else f"{one.peak_memory / 10**6:,.0f}",
    )


_GLANCE = (
    ("objective", "text"),
    ("shift, against random", "text"),
    ("specificity, against random", "text"),
    ("shift, against the first", "text"),
    ("specificity, against the first", "text"),
)


def _glance(one: ObjectiveSummary) -> Cells:
    """The verdicts on one objective."""
    against_random = (worded(one.against_random[measure]) for measure in CONDITIONING)
    against_first = (worded(one.against_first[measure]) if one.against_first else "–" for measure in CONDITIONING)
    return (_breaking(one.name), *against_random, *against_first)


_SHIFTS = (
    ("LoRA", "text"),
    ("prompt trained", "number"),
    ("paraphrases", "number"),
    ("controls", "number"),
    ("empty prompt", "number"),
    ("specificity", "number"),
)
_SHIFT_MEASURES = ("conditioning_shift", "shift_paraphrases", "shift_controls", "shift_empty", "specificity")


def _shifts(one: ObjectiveSummary) -> Iterator[Cells]:
    yield (_breaking(one.name), *(interval_text(one.measures[name]) for name in _SHIFT_MEASURES))
    yield ("↳ random", *(interval_text(one.random[name]) for name in _SHIFT_MEASURES))


_TESTS = (
    ("measure", "text"),
    ("objective", "text"),
    ("verdict", "text"),
    ("difference", "number"),
    ("p, t test", "number"),
    ("p, Wilcoxon", "number"),
    ("prompts", "number"),
)


def _tests(families: Mapping[str, Mapping[str, Paired]], measure: str) -> Iterator[Cells]:
    """The rows of one measure, by objective."""
    for name, family in families.items():
        paired = family[measure]
        yield (
            label_of(measure),
            _breaking(name),
            paired.outcome,
            interval_text(paired.difference, signed=True),
            shown(paired.p_t, 2),
            shown(paired.p_wilcoxon, 2),
            str(paired.difference.prompts if paired.difference else 0),
        )


def _against_first(objectives: Sequence[ObjectiveSummary], *, crossed: bool) -> list[Cells]:
    others = {one.name: one.against_first for one in objectives[1:]}
    measures = dict.fromkeys(measure for family in others.values() for measure in family)
    asked = [measure for measure in measures if measure.startswith("cross.") is crossed]
    return [row for measure in asked for row in _tests(others, measure)]


def _cross(one: ObjectiveSummary) -> Cells:
    return (_breaking(one.name), *(interval_text(cell.change, signed=True) for cell in one.cross.values()))


def _reach_columns(objectives: Sequence[ObjectiveSummary]) -> Columns:
    return [("objective", "text"), ("needs", "text"), *((shortened(one), "number") for one in _components(objectives))]


def _reach(objectives: Sequence[ObjectiveSummary]) -> list[Cells]:
    rows = []
    for one in objectives:
        reach = one.objective.reach or {}
        counts = ("{} of {}".format(*reach[name]) if name in reach else "–" for name in _components(objectives))
        rows.append((_breaking(one.name), ", ".join(one.objective.needs), *counts))
    return rows


def _components(objectives: Sequence[ObjectiveSummary]) -> list[str]:
    return list(dict.fromkeys(name for one in objectives for name in one.objective.reach or ()))


def _inert(objectives: Sequence[ObjectiveSummary]) -> Iterator[tuple[str, str]]:
    """Layers out of reach of objectives that reach others of the same component, for all objectives it is true of."""
    named: dict[tuple[str, ...], list[str]] = {}
    for one in objectives:
        reach = one.objective.reach or {}
        partly = [name for name, (reached, total) in reach.items() if 0 < reached < total]
        layers = tuple(layer for layer in one.objective.inert if layer.partition(".")[0] in partly)
        if layers:
            named.setdefault(layers, []).append(one.name)
    for layers, names in named.items():
        whose = "all objectives" if len(names) == len(objectives) else several(names, len(names))
        yield whose, several(layers, _MOST_INERT)


def _formulas(objectives: Sequence[ObjectiveSummary]) -> list[tuple[str, str]]:
    """Where an objective's name is not its formula."""
    return [
        (shortened(one.name), shortened(one.objective.formula, 600))
        for one in objectives
        if one.objective.formula != one.name
    ]


def _breaking(name: str) -> str:
    """A name that may go on in the next line after each of its underscores."""
    from markupsafe import Markup, escape

    return Markup("_<wbr>").join(escape(part) for part in shortened(name).split("_"))


def _mean(interval: Interval | None, *, scale: float = 1.0) -> str:
    return "–" if interval is None else shown(scale * interval.mean)


def _legible(value: Any) -> str:
    """A record in lines, whatever it holds."""
    lines = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True).split("\n")
    return "\n".join(shortened(line, 1000) for line in lines)
