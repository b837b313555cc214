"""The report of a comparison: each number where it belongs, nothing hostile runs, and it fits a phone."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
from chromium import needs_chromium, opened
from comparison_results import lifelike, results
from page_elements import EVIL, MEASURE, NOTE, Elements, noted
from PIL import Image

from lora_forge.comparison.results import Results
from lora_forge.comparison.summary import OWN, Summary, summarize
from lora_forge.comparison.verdicts import interval_text, verdicts
from lora_forge.pages.compare_page import compare_page

NAMES = ("quiet", "loud", "loud + 0.1*quiet", f"{EVIL}", "chance")


def with_images(made: Results, folder: Path) -> Results:
    """Of the first prompt, a picture each; and two that are not to be shown."""
    Image.new("RGB", (2000, 1000), "red").save(folder / "owl.png")
    Image.new("RGB", (8, 8)).save(folder.parent / "outside.png")
    (folder / "none.png").write_text("no picture", encoding="utf-8")
    shown = {0: "owl.png", 1: "../outside.png", 2: "none.png", 3: "missing.png"}
    rows = [
        replace(row, measured=replace(row.measured, image=shown[number])) if row.measured and number in shown else row
        for number, row in enumerate(made.rows)
    ]
    return replace(made, rows=tuple(rows))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    folder = tmp_path_factory.mktemp("comparison")
    made = with_images(lifelike(NAMES, 9, 2), folder)
    path = folder / "report.html"
    path.write_text(compare_page(made, folder), encoding="utf-8")
    return path, made


@pytest.fixture(scope="module")
def elements(page: tuple[Path, Results]) -> Elements:
    return Elements(page[0].read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def summary(page: tuple[Path, Results]) -> Summary:
    return summarize(page[1])


def test_the_verdicts_come_first(elements: Elements, summary: Summary) -> None:
    places = [elements.text.index(verdict) for verdict in verdicts(summary)]
    assert len(places) > 3
    assert places == sorted(places)
    assert places[-1] < elements.text.index("9 prompts × 2 seeds")


def test_each_objective_has_its_numbers_with_intervals(elements: Elements, summary: Summary) -> None:
    for one in summary.objectives:
        change = interval_text(one.measures[OWN], signed=True)
        measures = ("conditioning_shift", "specificity", "delta_norm", "effective_rank")
        assert "".join([change, *(interval_text(one.measures[measure]) for measure in measures)]) in elements.text
        shifts = ("conditioning_shift", "shift_paraphrases", "shift_controls", "shift_empty", "specificity")
        for means in (one.measures, one.random):
            assert "".join(interval_text(means[measure]) for measure in shifts) in elements.text
        seconds = one.measures["seconds_per_step"]
        assert seconds is not None
        assert f"20{1000 * seconds.mean:.4g}1.5300" in elements.text
    assert elements.text.count("17 (1 failed)") == 1
    assert elements.text.count("20 of 24") == len(NAMES)
    assert "term 'third' became NaN in step 7" in elements.text


def test_every_test_has_its_p_values_and_its_verdict(elements: Elements, summary: Summary) -> None:
    for one in summary.objectives:
        for family in (one.against_first, one.against_random):
            for paired in family.values():
                row = [paired.outcome, interval_text(paired.difference, signed=True)]
                assert "".join([*row, f"{paired.p_t:.2g}", f"{paired.p_wilcoxon:.2g}", "9"]) in elements.text


def test_the_points_are_the_means_and_the_whiskers_their_intervals(elements: Elements, summary: Summary) -> None:
    views = elements.figures["means and 95 % intervals"]
    measures = ("conditioning_shift", "specificity", "delta_norm", "effective_rank")
    for figure, measure in zip(views.values(), measures, strict=True):
        series = [one.measures[measure] for one in summary.objectives]
        assert figure["data"][0]["x"] == [mean.mean for mean in series if mean]
        whiskers = figure["data"][0]["error_x"]
        for mean, above, below in zip(series, whiskers["array"], whiskers["arrayminus"], strict=True):
            assert mean is not None
            assert (mean.mean + above, mean.mean - below) == pytest.approx((mean.high, mean.low))
        assert len(figure["data"]) == (2 if measure in ("conditioning_shift", "specificity") else 1)


def test_the_heat_map_and_the_table_are_the_cross_table(elements: Elements, summary: Summary) -> None:
    views = elements.figures["trained (rows) × measured (columns)"]
    shares = [[cell.share for cell in one.cross.values()] for one in summary.objectives]
    assert views["trained"]["data"][0]["z"] == shares
    random_shares = [[cell.random_share for cell in one.cross.values()] for one in summary.objectives]
    assert views["random, of equal norm"]["data"][0]["z"] == random_shares
    for one in summary.objectives:
        assert "".join(interval_text(cell.change, signed=True) for cell in one.cross.values()) in elements.text


def test_the_curves_are_changes_since_the_first_step_by_the_largest_and_by_the_first_value(
    elements: Elements, summary: Summary
) -> None:
    views = elements.figures["change since the first step"]
    for label, scale in (
        ("of its largest change", [one.curve.largest for one in summary.objectives if one.curve]),
        ("of its first value", [one.curve.start for one in summary.objectives if one.curve]),
    ):
        curves = [trace for trace in views[label]["data"] if trace["mode"] == "lines"]
        bands = [trace for trace in views[label]["data"] if trace["mode"] == "none"]
        assert len(curves) == len(bands) == len(NAMES)
        for one, by, curve, band in zip(summary.objectives, scale, curves, bands, strict=True):
            assert one.curve is not None
            assert one.curve.high is not None
            assert curve["x"] == list(range(1, 31))
            assert curve["y"] == pytest.approx([value / by for value in one.curve.mean])
            assert band["y"][:30] == pytest.approx([value / by for value in one.curve.high])


def test_an_objective_that_starts_at_zero_has_no_share_of_its_first_value() -> None:
    steps = {"zero": (1e-12, -1.0), "one": (1.0, 0.5)}
    made = results(("zero", "one"), 2, 1, lambda name, prompt, seed: {"steps": steps[name]})
    views = Elements(compare_page(made)).figures["change since the first step"]
    assert [len(view["data"]) for view in views.values()] == [4, 2]


def test_pictures_of_the_folder_are_within_the_page_made_small_and_nothing_else_is(
    page: tuple[Path, Results], elements: Elements
) -> None:
    (image,) = elements.all("img")
    start, _, data = (image["src"] or "").partition(",")
    assert start == "data:image/jpeg;base64"
    assert image["alt"] == "quiet · prompt 0 · seed 0"
    assert Image.open(BytesIO(base64.b64decode(data))).size == (640, 320)
    assert Elements(compare_page(page[1])).all("img") == []


def test_layers_out_of_reach_are_named_where_others_of_their_component_are_reached(elements: Elements) -> None:
    assert "Out of reach in components that are reached, for all objectives" in elements.text
    assert "text_encoder.layers.1.q, text_encoder.layers.1.k" in elements.text
    assert "unet.down_blocks.0.to_q" not in elements.text
    assert "0 of 116" in elements.text


@pytest.mark.parametrize("prompts", [0, 1])
def test_a_comparison_of_nearly_nothing_has_a_page(prompts: int) -> None:
    made = results(("one", "two"), prompts, 1)
    elements = Elements(compare_page(made))
    assert ("means and 95 % intervals" in elements.figures) is bool(prompts)
    assert ("too few prompts" if prompts else "no values to compare") in elements.text
    failed = Elements(compare_page(results(("one",), 2, 1, lambda name, prompt, seed: EVIL)))
    assert "one: 2 of 2 runs failed" in failed.text
    assert failed.all("img") == []


DRIVE = """
addEventListener("load", () => setTimeout(() => {
  const [means, cross, curves] = document.querySelectorAll(".chart");
  note("first", means.querySelector(".plot").data[0].x[0]);
  named(means, "button", "prompt specificity").click();
  note("second", means.querySelector(".plot").data[0].x[0]);
  note("cells", cross.querySelectorAll(".heatmap-label").length);
  note("curves", curves.querySelectorAll(".scatterlayer .trace").length);
  hover(cross.querySelector(".plot"), 0.1, 0.1);
  setTimeout(() => note("hover", hovered(cross.querySelector(".plot"))), 300);
}, 100));
"""


@needs_chromium
def test_charts_are_drawn_switching_works_and_nothing_hostile_runs(
    page: tuple[Path, Results], summary: Summary
) -> None:
    document, console = opened(page[0], script=NOTE + DRIVE)
    assert console == []
    assert "<title>5 objectives on tiny_sdxl</title>" in document
    assert document.count('class="plot js-plotly-plot"') == 3
    assert len(Elements(document).all("img")) == 1
    notes = noted(document)
    shift, ratio = (summary.objectives[0].measures[name] for name in ("conditioning_shift", "specificity"))
    assert shift is not None
    assert ratio is not None
    assert (notes["first"], notes["second"]) == (shift.mean, ratio.mean)
    assert notes["cells"] == len(NAMES) ** 2
    assert notes["curves"] == 2 * len(NAMES)
    assert "trained: quiet" in "".join(notes["hover"])


@needs_chromium
@pytest.mark.parametrize("dark", [True, False])
def test_the_page_fits_a_phone(page: tuple[Path, Results], dark: bool) -> None:
    document, console = opened(page[0], width=390, dark=dark, script=MEASURE)
    assert console == []
    assert document.count('class="plot js-plotly-plot"') == 3
    (wide,) = re.findall(r'data-wide="(\d+)"', document)
    assert int(wide) <= 390
