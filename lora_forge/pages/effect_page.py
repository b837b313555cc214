"""The page of `effect --html`: how far a LoRA file moves the conditioning, for which prompts, and by which layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lora_forge.effect.tokens import TokenShift
from lora_forge.errors import printable
from lora_forge.inspection.places import place_of
from lora_forge.inspection.report import shortened
from lora_forge.pages.bars import Bar, bars
from lora_forge.pages.figures import QUIET, SERIES, Chart, hover_text
from lora_forge.pages.heat_maps import Cell, component_maps
from lora_forge.pages.page import render
from lora_forge.pages.tables import Value, number, shown, words
from lora_forge.pages.token_bars import token_charts

_COLOURS = {"training": SERIES[1], "paraphrase": SERIES[2], "control": SERIES[0], "empty": QUIET}
_MOST_PROMPTS = 200  # of a chart

_TOGETHER = "conditioning"  # what the report calls all parts together

Report = Mapping[str, Any]


def effect_page(report: Report) -> str:
    """The page, as HTML, of what `effect --json` prints."""
    layers = report["layers"]
    return render(
        "effect.html",
        title=f"effect of {shortened(report['file'].rpartition('/')[2], 100)}",
        facts=_facts(report),
        notes=[printable(note) for note in report["notes"]],
        verdict=_verdict(report["specificity"]),
        specificity=[_specificity(one) for one in report["specificity"]],
        prompts=_prompts(report),
        more_prompts=max(0, len(report["prompts"]) - _MOST_PROMPTS),
        maps=_maps(layers),
        tokens=token_charts([TokenShift(**token) for token in report["tokens"]]),
        columns=_columns(layers),
        rows=[_row(layer, _parts(layers)) for layer in layers],
    )


def _facts(report: Report) -> list[tuple[str, str]]:
    prompts = report["prompts"]
    rows = [
        ("file", report["file"]),
        ("base model", f"{report['base_model']} ({report['backend']})"),
        ("training prompt", prompts[0]["text"] if prompts else None),
        ("second prompt", prompts[0]["text_2"] if prompts else None),
        ("encoders run", ", ".join(report["encoders"])),
    ]
    return [(label, shortened(text, 300)) for label, text in rows if text]


def _verdict(specificity: Sequence[Report]) -> str:
    """The prompt specificity of all parts together, in words."""
    if not specificity:
        return ""
    whole = specificity[0]
    if whole["ratio"] is None:
        return f"It has no prompt specificity: {whole['reason']}."
    times = f"{whole['ratio']:.3g} times as far as prompts that have nothing to do with it"
    return f"It moves its training prompt {times}: that is its prompt specificity."


def _specificity(one: Report) -> tuple[str, str, str, str, str]:
    return (
        _part(one["name"]),
        shown(one["ratio"], 3),
        shown(one["training"]),
        shown(one["controls"]),
        shortened(one["reason"], 300),
    )


def _prompts(report: Report) -> Chart | None:
    """A view for all parts together, and one for each part."""
    prompts = report["prompts"][:_MOST_PROMPTS]
    if not prompts:
        return None
    views = []
    for index, one in enumerate(report["specificity"]):
        rows = [
            Bar(
                shortened(_text(prompt)),
                prompt["shifts"][index]["relative"],
                _prompt_hover(prompt, index),
                prompt["role"],
            )
            for prompt in prompts
        ]
        mean = one["controls"]
        mark = None if mean is None else ("mean of controls", mean)
        views.append((_part(one["name"]), bars(rows, _COLOURS, mark=mark)))
    about = f"bars of {len(prompts)} prompts; the training prompt's is the first. {_verdict(report['specificity'])}"
    return Chart("relative shift by prompt", views, about)


def _part(name: str) -> str:
    return "all together" if name == _TOGETHER else shortened(name)


def _text(prompt: Report) -> str:
    if prompt["role"] == "empty":
        return "the empty prompt"
    return prompt["text"] if prompt["text_2"] is None else f"{prompt['text']} / {prompt['text_2']}"


def _prompt_hover(prompt: Report, index: int) -> str:
    shift = prompt["shifts"][index]
    text = shortened(_text(prompt), 200)
    lines = [text[start : start + 60] for start in range(0, len(text), 60)]
    return hover_text(
        [f"{prompt['role']}:", *lines, f"{_part(shift['name'])}: relative shift {shown(shift['relative'])}"]
    )


def _maps(layers: Sequence[Report]) -> list[Chart]:
    """What each layer does alone, its ‖ΔW‖, and what is left without it where that was measured."""
    measures = {"shift alone": "alone", "‖ΔW‖": "delta_norm", "shift without it": "without"}
    cells: dict[str, dict[str, list[Cell]]] = {}
    for layer in layers:
        place, hover = place_of(layer["component"], layer["layer"], layer["layer"]), _layer_hover(layer)
        for measure, key in measures.items():
            value = layer[key]
            if value is not None:
                cell = Cell(place, value if math.isfinite(value) else None, hover)
                cells.setdefault(layer["component"], {}).setdefault(measure, []).append(cell)
    return component_maps(cells, logarithmic={"shift alone", "‖ΔW‖"})


def _layer_hover(layer: Report) -> str:
    return hover_text(
        [
            shortened(layer["layer"], 100),
            f"shift alone {shown(layer['alone'])}",
            *(f"{shortened(part)}: {shown(shift)}" for part, shift in layer["parts"].items()),
            f"‖ΔW‖ {shown(layer['delta_norm'])}",
            "" if layer["without"] is None else f"shift without it {shown(layer['without'])}",
            "moves nothing" if layer["alone"] == 0 else "",
        ]
    )


def _columns(layers: Sequence[Report]) -> list[tuple[str, str]]:
    without = ["shift without it"] if any(layer["without"] is not None for layer in layers) else []
    names = ["shift alone", "‖ΔW‖", *without, *map(shortened, _parts(layers))]
    return [("layer", "text"), *((name, "number") for name in names)]


def _row(layer: Report, parts: Sequence[str]) -> list[Value]:
    return [
        words(shortened(f"{layer['component']}.{layer['layer']}", 200)),
        number(layer["alone"]),
        number(layer["delta_norm"]),
        *([number(layer["without"])] if layer["without"] is not None else []),
        *(number(layer["parts"].get(part)) for part in parts),
    ]


def _parts(layers: Sequence[Report]) -> list[str]:
    return list(dict.fromkeys(part for layer in layers for part in layer["parts"]))
