"""The page of `inspect --html`: one file, nothing from elsewhere, charts and a table that work, nothing hostile run."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from chromium import needs_chromium, opened
from lora_files import Q_PROJ, TO_K, numbers, pair, saved, small_sdxl
from page_elements import EVIL, MEASURE, Elements, noted

from lora_forge.cli.main import main
from lora_forge.inspection.places import place_of
from lora_forge.pages.heat_maps import Cell, colour_range, heat_map


def page_of(folder: Path, *files: Path) -> Path:
    page = folder / "page.html"
    assert main(["inspect", *map(str, files), "--html", str(page)]) == 0
    return page


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a file with a layer that does nothing and one that holds NaN."""
    folder = tmp_path_factory.mktemp("page")
    tensors = small_sdxl()
    tensors[f"{TO_K}.lora_up.weight"].zero_()
    for number in range(1, 11):
        tensors |= pair(Q_PROJ.replace("layers_0", f"layers_{number}"), 6, 5, alpha=float(number))
    tensors[f"{Q_PROJ}.lora_up.weight"][0, 0] = math.nan
    return page_of(folder, saved(folder / "owl.safetensors", tensors, {"ss_output_name": "owl"}))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a file each of whose names is an attempt at a script."""
    folder = tmp_path_factory.mktemp("hostile")
    names = [f"unet.{EVIL}", f"unet.mid_block.attentions.0.{EVIL}", EVIL, 'unet.<a href="javascript:alert(1)">a</a>']
    tensors = {f"{name}.lora_{part}.weight": numbers(2, 2) for name in names for part in "AB"} | {EVIL: numbers(1)}
    record = json.dumps({"run": {"prompt": EVIL, "loss": [{"name": EVIL}]}})
    return page_of(folder, saved(folder / "h.safetensors", tensors, {EVIL: EVIL, "lora_forge": record}))


def test_a_page_is_one_file_that_needs_no_other(page: Path) -> None:
    elements = Elements(page.read_text(encoding="utf-8"))
    for _, attributes in elements.found:
        assert attributes.keys().isdisjoint({"src", "srcset", "action"})
        assert (attributes.get("href") or "data:,").startswith(("data:,", "#"))
    (policy,) = [one["content"] for one in elements.all("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy.partition("style-src")[0]


def test_the_same_file_gives_the_same_page(tmp_path: Path) -> None:
    file = saved(tmp_path / "a.safetensors", small_sdxl())
    first = page_of(tmp_path, file).read_bytes()
    (tmp_path / "page.html").unlink()
    assert page_of(tmp_path, file).read_bytes() == first


def test_what_is_hostile_in_a_file_is_text_on_its_page(hostile: Path) -> None:
    elements = Elements(hostile.read_text(encoding="utf-8"))
    assert elements.all("img") == []
    scripts = [one.get("type") for one in elements.all("script")]
    assert scripts.count(None) == 2
    assert set(scripts) == {None, "application/json"}
    assert "<img src=x onerror=" in elements.text
    assert "{{7*7}}" in elements.text


def test_a_heat_map_has_every_layer_in_its_cell() -> None:
    cells = [
        Cell(place_of("unet", f"{block}.{projection}", ""), value, "")
        for number, block in enumerate(
            ("mid_block.attentions.0", "down_blocks.10.resnets.0", "down_blocks.2.resnets.0")
        )
        for projection, value in (("a", 10.0**number), ("b", 0.0))
    ]
    span = colour_range(cells, logarithmic=True)
    values, nothing, broken = json.loads(heat_map(cells, span=span, logarithmic=True))["data"]
    assert span == (0.0, 2.0)
    assert values["y"] == ["down.2.res.0", "down.10.res.0", "mid.att.0"]
    assert values["z"] == [[2.0, None], [1.0, None], [0.0, None]]
    assert nothing["z"] == [[None, 1], [None, 1], [None, 1]]
    assert broken["z"] == [[None, None]] * 3


def test_a_page_of_headers_alone_has_a_table_and_no_charts(tmp_path: Path) -> None:
    file, page = saved(tmp_path / "a.safetensors", small_sdxl()), tmp_path / "page.html"
    assert main(["inspect", "--headers", str(file), "--html", str(page)]) == 0
    elements = Elements(page.read_text(encoding="utf-8"))
    assert elements.all("figure") == []
    assert "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k" in elements.text


def test_several_files_share_a_page_with_a_list_of_them(tmp_path: Path) -> None:
    files = [saved(tmp_path / name, small_sdxl()) for name in ("one.safetensors", "two.safetensors")]
    elements = Elements(page_of(tmp_path, *files).read_text(encoding="utf-8"))
    links = [one["href"] for one in elements.all("a")]
    assert links == ["#file-1", "#file-2"]
    assert {f"#{one.get('id')}" for one in elements.all("section")} == set(links)


def test_a_file_without_a_layer_has_no_page(tmp_path: Path) -> None:
    file, page = saved(tmp_path / "a.safetensors", {"odd": torch.ones(1)}), tmp_path / "page.html"
    assert main(["inspect", str(file), "--html", str(page)]) == 2
    assert not page.exists()


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(1300, False), (390, True)])
def test_a_browser_draws_the_charts_without_a_word_on_its_console(page: Path, width: int, dark: bool) -> None:
    document, console = opened(page, width=width, dark=dark, script=MEASURE)
    assert console == []
    assert document.count('class="plot js-plotly-plot"') == 3
    assert len(re.findall(r'<g class="hm">', document)) >= 3
    (wide,) = re.findall(r'data-wide="(\d+)"', document)
    assert int(wide) <= width
    assert ('data-back="rgb(20, 22, 26)"' in document) == dark


@needs_chromium
def test_a_browser_runs_nothing_of_a_hostile_file(hostile: Path) -> None:
    document, console = opened(hostile)
    assert console == []
    assert "<title>LoRA: h.safetensors</title>" in document
    assert 'class="plot js-plotly-plot"' in document
    elements = Elements(document)
    assert elements.all("img") == elements.all("a") == []
    assert "<img src=x onerror=" in elements.text


DRIVE = """
addEventListener("load", () => setTimeout(() => {
  const root = document.documentElement;
  const table = document.querySelector(".sortable");
  const text = (one) => one.textContent;
  const rows = () => [...table.querySelectorAll("tbody tr:not([hidden])")];
  const column = (number) => rows().map((row) => text(row.cells[number]));
  const head = (name) => [...table.querySelectorAll("th button")].find((one) => text(one) === name);
  const note = (name, value) => { root.setAttribute("data-note-" + name, JSON.stringify(value)); };
  head("‖ΔW‖").click();
  note("falling", column(1));
  note("sorted", head("‖ΔW‖").parentElement.getAttribute("aria-sort"));
  head("‖ΔW‖").click();
  note("rising", column(1));
  head("layer").click();
  note("layers", column(0));
  const input = table.querySelector("input");
  input.value = "UNET to_k";
  input.dispatchEvent(new Event("input"));
  note("filtered", column(0));
  note("count", table.querySelector("output").textContent);
  const [norm, rank] = document.querySelectorAll(".chart figcaption button");
  rank.click();
  note("pressed", [norm, rank].map((button) => button.getAttribute("aria-pressed")));
  const before = getComputedStyle(document.body).backgroundColor;
  document.querySelector(".theme").click();
  note("switched", before !== getComputedStyle(document.body).backgroundColor);
  norm.click();
  const plot = document.querySelector(".plot");
  const drag = plot.querySelector(".nsewdrag");
  const box = drag.getBoundingClientRect();
  for (const kind of ["mouseover", "mousemove"]) {
    drag.dispatchEvent(new MouseEvent(kind, {
      bubbles: true, clientX: box.left + box.width / 2, clientY: box.top + 2.5 * box.height / 11,
    }));
  }
  setTimeout(() => note("hover", [...plot.querySelectorAll(".hoverlayer .nums tspan")].map(text)), 300);
}, 100));
"""


@needs_chromium
def test_sorting_filtering_switching_and_hovering_work(page: Path) -> None:
    document, console = opened(page, script=DRIVE)
    assert console == []
    notes = noted(document)
    known = [float(text) for text in notes["falling"] if text != "–"]
    assert len(known) == 13
    assert known == sorted(known, reverse=True)
    assert notes["falling"][-1] == notes["rising"][-1] == "–"
    assert [float(text) for text in notes["rising"][:-1]] == known[::-1]
    assert notes["sorted"] == "descending"
    numbers_in_order = [int(re.findall(r"layers\.(\d+)", layer)[0]) for layer in notes["layers"][:11]]
    assert numbers_in_order == list(range(11))
    assert notes["filtered"] == ["unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"]
    assert notes["count"] == "1 of 14"
    assert notes["pressed"] == ["false", "true"]
    assert notes["switched"] is True
    assert notes["hover"][0] == "text_model.encoder.layers.2.self_attn.q_proj"
