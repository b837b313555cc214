"""The report of a run: what was asked, how the objective went and what the LoRA does, each number where it belongs."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from chromium import needs_chromium, opened
from page_elements import EVIL, MEASURE, NOTE, Elements, noted

import lora_forge
from lora_forge.effect.tokens import TokenShift
from lora_forge.pages.figures import SERIES
from lora_forge.pages.lines import Line, lines
from lora_forge.pages.run_page import run_page

LOSS = '''
from lora_forge.hookspecs import hookimpl
from lora_forge.records import LossSpec

def stay(batch):
    """How far the conditioning is from where it was."""
    after, before = batch.conditioning(batch.adapted()), batch.conditioning(batch.frozen())
    return sum((after[name] - before[name]).flatten(1).square().mean(dim=1) for name in after)

@hookimpl
def lora_forge_losses():
    yield LossSpec(name="stay", summary="stay", needs={"text"}, factory=stay)
'''
PART = "text_encoder penultimate"
WORDS = ["<|startoftext|>", "an", "owl", "<|endoftext|>", "!", "!"]
TOKENS = [
    TokenShift(PART, "text_encoder", place, text, place > 3, 0.01 * (place + 1), (0.1, 0.2, 0.3, 0.1, 0.2, 0.1)[place])
    for place, text in enumerate(WORDS)
]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> lora_forge.RunResult:
    """Of two losses, on tiny_sdxl."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "stay.py").write_text(LOSS, encoding="utf-8")
    return lora_forge.run(
        "a steampunk owl",
        "tiny_sdxl",
        iterations=5,
        alpha=2.0,
        optimizer={"options": {"lr": 0.01}},
        loss=["embedding_magnitude:0.5", "stay:3"],
        plugins=[folder / "stay.py"],
        output=folder / "owl.safetensors",
    )


@pytest.fixture(scope="module")
def elements(result: lora_forge.RunResult) -> Elements:
    return Elements(run_page(result, TOKENS))


def test_a_report_says_what_was_asked_what_was_made_and_how_to_use_it(
    result: lora_forge.RunResult, elements: Elements
) -> None:
    asked = (result.run.prompt, "0.5 × embedding_magnitude(", "3 × stay", "tiny_sdxl", "4, 2", "adamw(", "gaussian(")
    for told in (*asked, str(result.path), *result.warnings, *result.usage.split("\n")):
        assert told in elements.text
    assert "164, of which 136 do nothing" in elements.text
    for name, before in {**result.before.terms, "L2": result.before.l2, "total": result.before.loss}.items():
        after = {**result.after.terms, "L2": result.after.l2, "total": result.after.loss}[name]
        assert f"{name}{before:.6g}{after:.6g}{after - before:+.3g}" in elements.text


def test_the_lines_are_the_total_each_term_and_l2_at_every_step_and_since_the_first(
    result: lora_forge.RunResult, elements: Elements
) -> None:
    views = elements.figures["the objective over the steps"]
    assert set(views) == {"change", "value"}
    expected = {
        "total": [step.loss for step in result.steps],
        "embedding_magnitude": [step.terms["embedding_magnitude"] for step in result.steps],
        "stay": [step.terms["stay"] for step in result.steps],
        "L2": [step.l2 for step in result.steps],
    }
    assert {line["name"]: line["y"] for line in views["value"]["data"]} == expected
    assert [line["x"] for line in views["value"]["data"]] == [[1, 2, 3, 4, 5]] * 4
    for line in views["change"]["data"]:
        first = expected[line["name"]][0]
        assert line["y"] == pytest.approx([value - first for value in expected[line["name"]]])


def test_the_heat_maps_hold_every_layers_norm_and_show_inert_ones_as_doing_nothing(
    result: lora_forge.RunResult, elements: Elements
) -> None:
    for component, layers in result.weights.items():
        values, nothing, broken = elements.figures[component]["‖ΔW‖"]["data"]
        products = [2.0 / 4 * pair["lora_B"].double() @ pair["lora_A"].double() for pair in layers.values()]
        norms = sorted(float(product.norm().log10()) for product in products if product.any())
        shown = sorted(value for row in values["z"] for value in row if value is not None)
        assert shown == pytest.approx(norms, abs=1e-5)
        assert sum(cell == 1 for row in nothing["z"] for cell in row) == len(layers) - len(norms)
        assert not any(cell for row in broken["z"] for cell in row)
        assert {text.split("<br>")[0] for row in values["text"] for text in row if text} == set(layers)
    assert set(result.inert) == {f"unet.{layer}" for layer in result.weights["unet"]}
    grey = elements.figures["unet"]["‖ΔW‖"]["data"][1]["text"][0][0]
    assert grey.endswith("does nothing<br>out of the objective's reach")


def test_the_table_has_every_layer(result: lora_forge.RunResult, elements: Elements) -> None:
    assert len(elements.all("tr")) > 164
    for component, layers in result.weights.items():
        assert all(f"{component}.{layer}" in elements.text for layer in layers)


def test_the_bars_are_the_shift_of_each_part_and_of_all_together(
    result: lora_forge.RunResult, elements: Elements
) -> None:
    parts, together = elements.figures["relative shift by part"][""]["data"]
    assert parts["x"] == [shift.relative for shift in result.effect.shifts]
    assert together["x"] == [result.effect.conditioning_shift]


def test_each_token_of_the_text_has_a_bar_and_padding_has_one_for_all(elements: Elements) -> None:
    views = elements.figures[PART]
    text, padding = views["relative shift"]["data"]
    assert text["x"] == pytest.approx([0.01, 0.02, 0.03, 0.04])
    assert padding["x"] == pytest.approx([0.055])
    names = views["relative shift"]["layout"]["yaxis"]["ticktext"]
    assert names == ["&lt;|startoftext|&gt;", "an", "owl", "&lt;|endoftext|&gt;", "padding, mean of 2"]
    text, padding = views["share of its change"]["data"]
    assert text["x"] == pytest.approx([0.1, 0.2, 0.3, 0.1])
    assert padding["x"] == pytest.approx([0.3])


def test_a_preview_is_within_the_page_and_there_is_no_picture_without_one(result: lora_forge.RunResult) -> None:
    picture = b"\x89PNG\r\n\x1a\n not really"
    (image,) = Elements(run_page(result, preview=picture)).all("img")
    assert image["alt"]
    start, _, data = (image["src"] or "").partition(",")
    assert start == "data:image/png;base64"
    assert base64.b64decode(data) == picture
    assert Elements(run_page(result)).all("img") == []


def test_what_there_is_nothing_of_is_left_out(result: lora_forge.RunResult) -> None:
    effect = dataclasses.replace(result.effect, shifts=(), conditioning_shift=None)
    bare = dataclasses.replace(result, steps=(), effect=effect, warnings=(), usage="", path=None, files=())
    elements = Elements(run_page(bare))
    assert set(elements.figures) == {"text_encoder", "text_encoder_2", "unet"}
    assert "Nothing: it has no layers in a text encoder." in elements.text
    assert "nothing: no output was asked for" in elements.text
    for title in ("Warnings", "Use it", "Token by token"):
        assert title not in elements.text


def test_a_report_is_one_file_that_needs_no_other_and_tells_what_each_figure_shows(elements: Elements) -> None:
    for _, attributes in elements.found:
        assert attributes.keys().isdisjoint({"src", "srcset", "action"})
        assert (attributes.get("href") or "data:,").startswith(("data:,", "#"))
    plots = [one for one in elements.all("div") if one.get("class") == "plot"]
    assert len(plots) == len(elements.all("figcaption")) == len(elements.figures) == 6
    assert all(one.get("role") == "img" and ": " in (one.get("aria-label") or "") for one in plots)


def channel(value: int) -> float:
    return value / 255 / 12.92 if value <= 10 else ((value / 255 + 0.055) / 1.055) ** 2.4


def luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2 defines it."""
    digits = colour.removeprefix("#")
    pairs = [digit * 2 for digit in digits] if len(digits) == 3 else [digits[at : at + 2] for at in (0, 2, 4)]
    red, green, blue = (channel(int(pair, 16)) for pair in pairs)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_each_series_stands_out_from_the_paper_in_light_and_in_dark(elements: Elements) -> None:
    css = (Path(lora_forge.__file__).parent / "pages" / "templates" / "page.css").read_text(encoding="utf-8")
    themes = [dict(re.findall(r"(--[\w-]+): (#\w+)", line)) for line in css.splitlines() if "--series-1:" in line]
    light, dark, chosen = themes
    assert dark == chosen
    for theme in (light, dark):
        for name in [one[4:-1] for one in SERIES]:
            low, high = sorted((luminance(theme[name]), luminance(theme["--paper"])))
            assert (high + 0.05) / (low + 0.05) >= 4.5


def test_lines_differ_by_more_than_their_colours() -> None:
    names = [f"loss {number}" for number in range(6)]
    figure: dict[str, Any] = json.loads(lines([Line(name, [1.0, 2.0]) for name in names], axis="value"))
    assert len({line["line"]["dash"] for line in figure["data"]}) == 6
    assert len({line["line"]["color"] for line in figure["data"]}) == 6


@pytest.fixture(scope="module")
def page(result: lora_forge.RunResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report all of whose words are an attempt at a script."""
    steps = tuple(dataclasses.replace(step, terms={EVIL: step.loss, "x": 1.0}) for step in result.steps)
    evil = dataclasses.replace(
        result,
        run=dataclasses.replace(result.run, prompt=EVIL),
        steps=steps,
        after=steps[-1],
        before=steps[0],
        warnings=(EVIL,),
        usage=EVIL,
        metadata={},
    )
    tokens = [dataclasses.replace(token, text=EVIL) for token in TOKENS]
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(run_page(evil, tokens), encoding="utf-8")
    return path


DRIVE = """
addEventListener("load", () => setTimeout(() => {
  const chart = (title) => [...document.querySelectorAll(".chart")].find(
    (one) => one.querySelector("figcaption").firstChild.textContent === title);
  const objective = chart("the objective over the steps"), plot = objective.querySelector(".plot");
  note("change", plot.data[0].y[0]);
  named(objective, "button", "value").click();
  note("value", plot.data[0].y[0]);
  const colour = () => plot.data[0].line.color;
  const before = colour();
  document.querySelector(".theme").click();
  note("colours", [before, colour()]);
  const table = document.querySelector(".sortable");
  named(table, "th button", "‖ΔW‖").click();
  note("norms", [...table.querySelectorAll("tbody tr")].map((row) => Number(row.cells[1].dataset.key)));
  const map = chart("unet").querySelector(".plot"), tokens = chart("text_encoder penultimate").querySelector(".plot");
  hover(plot, 0.5, 0.5);
  hover(map, 0.01, 0.01);
  hover(tokens, 0.01, 0.5);
  setTimeout(() => { note("lines", hovered(plot)); note("map", hovered(map)); note("tokens", hovered(tokens)); }, 300);
}, 100));
"""


@needs_chromium
def test_switching_sorting_and_hovering_work_in_a_report_and_nothing_hostile_runs(
    page: Path, result: lora_forge.RunResult
) -> None:
    document, console = opened(page, script=NOTE + DRIVE)
    assert console == []
    elements, notes = Elements(document), noted(document)
    assert "<title>&lt;img" in document or "<title><img" in document
    assert elements.all("img") == []
    assert document.count('class="plot js-plotly-plot"') == 6
    assert notes["change"] == 0
    assert notes["value"] == result.steps[0].loss
    assert notes["colours"] == ["#0072b2", "#56b4e9"]
    assert notes["norms"] == sorted(notes["norms"], reverse=True)
    assert len(notes["norms"]) == 164
    told = "".join(notes["lines"])
    assert "<img src=x onerror=" in told
    assert "total" in told
    assert "does nothing" in "".join(notes["map"])
    assert "of the part's squared change" in "".join(notes["tokens"])


@needs_chromium
def test_a_report_fits_a_phone_in_the_dark(page: Path) -> None:
    document, console = opened(page, width=390, dark=True, script=MEASURE)
    assert console == []
    assert document.count('class="plot js-plotly-plot"') == 6
    (wide,) = re.findall(r'data-wide="(\d+)"', document)
    assert int(wide) <= 390
    assert 'data-back="rgb(20, 22, 26)"' in document
