"""The page of `effect --html`, and shifts token by token: the same for a run as for the file that it wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from chromium import needs_chromium, opened
from page_elements import EVIL, MEASURE, NOTE, Elements, noted
from safetensors.torch import load_file, save_file

import lora_forge
from lora_forge.bank import Bank, BankSlot
from lora_forge.batch import ModelView
from lora_forge.builtin.sd15.backend import Sd15Backend
from lora_forge.builtin.sdxl.backend import SdxlBackend
from lora_forge.cli.main import main
from lora_forge.clip_unet.family import Family
from lora_forge.contracts import BackendRequest, TargetLayer
from lora_forge.effect.tokens import TokenShift, token_shifts

BACKENDS = {"sdxl": SdxlBackend, "sd15": Sd15Backend}
PROMPTS = ("a steampunk owl", "two boats at dawn, oil painting")


def effect(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["effect", *map(str, arguments), "--device", "cpu", "--json"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def shifts_in_one_bank(results: Sequence[lora_forge.RunResult], family: Family, folder: Path) -> list[list[TokenShift]]:
    """As a run has it after its last step: all prompts side by side in one bank, and the view of them."""
    backend, slot = BACKENDS[family.name].open(BackendRequest(str(folder), "cpu", "float32")), BankSlot()
    encoders = list(family.encoders)
    layers = [
        TargetLayer(component, layer, *backend.architecture()[component][layer])
        for component in encoders
        for layer in results[0].weights[component]
    ]
    rank, alpha = results[0].rank, results[0].alpha
    backend.load(encoders)
    backend.adapt(layers, rank, alpha, slot)
    bank = Bank(layers, rank=rank, alpha=alpha, prompts=len(results))
    bank.fill(
        {
            component: {
                layer: {
                    name: torch.stack([one.weights[component][layer][name] for one in results])
                    for name in ("lora_A", "lora_B")
                }
                for layer in results[0].weights[component]
            }
            for component in encoders
        }
    )
    slot.bank = bank
    texts = {encoder: [one.run.prompt for one in results] for encoder in encoders}
    return token_shifts(ModelView(backend, slot, texts, [0] * len(results), "cpu"))


def test_a_runs_token_shifts_are_those_that_effect_measures_of_the_file_it_wrote(
    family: Family, model: str, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = [
        lora_forge.run(
            prompt, model, iterations=2, alpha=2.0, target_shift=0.1, seed=seed, output=tmp_path / f"{seed}.safetensors"
        )
        for seed, prompt in enumerate(PROMPTS)
    ]
    rows = shifts_in_one_bank(results, family, model_folder)
    assert len(rows) == 2
    for result, row in zip(results, rows, strict=True):
        assert result.path is not None
        answer = effect(capsys, str(result.path), "--skip-layers", "--random", "0")
        of_file = [TokenShift(**one) for one in answer["tokens"]]
        assert [(one.part, one.position, one.text, one.padding) for one in row] == [
            (one.part, one.position, one.text, one.padding) for one in of_file
        ]
        assert [one.relative for one in row] == pytest.approx([one.relative for one in of_file], rel=1e-3, abs=1e-7)
        assert [one.share for one in row] == pytest.approx([one.share for one in of_file], rel=2e-3, abs=1e-9)
        assert max(one.relative for one in row) > 0.01


@pytest.fixture(scope="module")
def owl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("owl") / "owl.safetensors"
    lora_forge.run("a steampunk owl", "tiny_sdxl", iterations=3, target_shift=0.1, output=path)
    return path


@pytest.fixture(scope="module")
def measured(owl: Path) -> tuple[Path, dict[str, Any]]:
    """A page of prompts each of which is an attempt at a script, and the same as JSON."""
    page, said = owl.with_name("page.html"), StringIO()
    given = ["--paraphrase", EVIL, "--control", f"{EVIL} too", "--random", "2", "--leave-one-out"]
    with redirect_stdout(said):
        assert main(["effect", str(owl), *given, "--device", "cpu", "--json", "--html", str(page)]) == 0
    return page, json.loads(said.getvalue())


def test_each_prompts_bar_is_its_shift_in_the_colour_of_its_role_and_the_specificity_is_stated(
    measured: tuple[Path, dict[str, Any]],
) -> None:
    elements, answer = Elements(measured[0].read_text(encoding="utf-8")), measured[1]
    views = elements.figures["relative shift by prompt"]
    assert list(views) == ["all together", *(one["name"] for one in answer["specificity"][1:])]
    for index, figure in enumerate(views.values()):
        assert [bar["name"] for bar in figure["data"]] == ["training", "paraphrase", "control", "empty"]
        for bar in figure["data"]:
            own = [one["shifts"][index]["relative"] for one in answer["prompts"] if one["role"] == bar["name"]]
            assert bar["x"] == own
        assert len({bar["marker"]["color"] for bar in figure["data"]}) == 4
        (line,) = figure["layout"]["shapes"]
        assert line["x0"] == line["x1"] == answer["specificity"][index]["controls"]
    assert f"{answer['specificity'][0]['ratio']:.3g} times as far" in elements.text


def test_the_heat_maps_and_the_table_hold_what_each_layer_does(measured: tuple[Path, dict[str, Any]]) -> None:
    elements, answer = Elements(measured[0].read_text(encoding="utf-8")), measured[1]
    for encoder in ("text_encoder", "text_encoder_2"):
        layers = [one for one in answer["layers"] if one["component"] == encoder]
        alone, nothing, _ = elements.figures[encoder]["shift alone"]["data"]
        shown = sorted(10**value for row in alone["z"] for value in row if value is not None)
        assert shown == pytest.approx(sorted(one["alone"] for one in layers if one["alone"]))
        assert sum(cell == 1 for row in nothing["z"] for cell in row) == sum(one["alone"] == 0 for one in layers)
        assert set(elements.figures[encoder]) == {"shift alone", "‖ΔW‖", "shift without it"}
        for one in layers:
            row = [f"{one[key]:.4g}" for key in ("alone", "delta_norm", "without")]
            assert f"{one['component']}.{one['layer']}{''.join(row)}" in elements.text
    assert sum(one["alone"] == 0 for one in answer["layers"]) == 4  # the last layer of encoder 1, which SDXL leaves out


def test_there_is_a_chart_of_tokens_for_each_part_that_has_them(measured: tuple[Path, dict[str, Any]]) -> None:
    elements, answer = Elements(measured[0].read_text(encoding="utf-8")), measured[1]
    for part in dict.fromkeys(one["part"] for one in answer["tokens"]):
        tokens = [one for one in answer["tokens"] if one["part"] == part]
        text, padding = elements.figures[part]["share of its change"]["data"]
        assert text["x"] == [one["share"] for one in tokens if not one["padding"]]
        assert padding["x"] == pytest.approx([sum(one["share"] for one in tokens if one["padding"])])


DRIVE = """
addEventListener("load", () => setTimeout(() => {
  const [prompts] = document.querySelectorAll(".chart"), plot = prompts.querySelector(".plot");
  const first = () => plot.data[0].x[0];
  note("together", first());
  named(prompts, "button", "text_encoder_2 pooled").click();
  note("pooled", first());
  const table = document.querySelector(".sortable");
  named(table, "th button", "shift alone").click();
  note("alone", [...table.querySelectorAll("tbody tr")].map((row) => Number(row.cells[1].dataset.key)));
  hover(plot, 0.01, 0.08);
  setTimeout(() => note("hover", hovered(plot)), 300);
}, 100));
"""


@needs_chromium
def test_switching_sorting_and_hovering_work_and_nothing_hostile_runs(measured: tuple[Path, dict[str, Any]]) -> None:
    page, answer = measured
    document, console = opened(page, script=NOTE + DRIVE)
    assert console == []
    assert "<title>effect of owl.safetensors</title>" in document
    elements, notes = Elements(document), noted(document)
    assert elements.all("img") == elements.all("a") == []
    assert document.count('class="plot js-plotly-plot"') == 5
    together, *_, pooled = answer["prompts"][0]["shifts"]
    assert (notes["together"], notes["pooled"]) == (together["relative"], pooled["relative"])
    assert notes["alone"] == sorted((one["alone"] for one in answer["layers"]), reverse=True)
    assert "a steampunk owl" in "".join(notes["hover"])


@needs_chromium
def test_the_page_fits_a_phone_in_the_dark(measured: tuple[Path, dict[str, Any]]) -> None:
    document, console = opened(measured[0], width=390, dark=True, script=MEASURE)
    assert console == []
    assert document.count('class="plot js-plotly-plot"') == 5
    (wide,) = re.findall(r'data-wide="(\d+)"', document)
    assert int(wide) <= 390


def test_a_lora_that_moves_nothing_has_a_page_that_says_so(owl: Path, tmp_path: Path) -> None:
    file, page = tmp_path / "unet.safetensors", tmp_path / "page.html"
    save_file({name: one for name, one in load_file(owl).items() if name.startswith("lora_unet")}, file)
    assert main(["effect", str(file), "--model", "tiny_sdxl", "--html", str(page)]) == 0
    elements = Elements(page.read_text(encoding="utf-8"))
    assert elements.figures == {}
    assert "it moves nothing of what the denoiser is conditioned on" in elements.text


def test_a_lora_of_zeros_has_a_page_without_a_specificity(tmp_path: Path) -> None:
    file, page = tmp_path / "zero.safetensors", tmp_path / "page.html"
    lora_forge.run("a steampunk owl", "tiny_sdxl", iterations=0, output=file)
    assert main(["effect", str(file), "--random", "1", "--device", "cpu", "--html", str(page)]) == 0
    elements = Elements(page.read_text(encoding="utf-8"))
    assert "no prompt specificity: it moves neither the training prompt nor the control prompts" in elements.text
    assert all(bar["x"] == [0] for bar in elements.figures["relative shift by prompt"]["all together"]["data"])


def test_a_page_replaces_nothing_unasked_and_never_the_file_it_is_about(
    owl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    page.write_text("mine", encoding="utf-8")
    assert main(["effect", str(owl), "--html", str(page)]) == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    before = owl.read_bytes()
    assert main(["effect", str(owl), "--html", str(owl), "--overwrite"]) == 2
    assert page.read_text(encoding="utf-8") == "mine"
    assert owl.read_bytes() == before
    few = ("--random", "1", "--skip-layers", "--device", "cpu")
    assert main(["effect", str(owl), *few, "--html", str(page), "--overwrite"]) == 0
    assert f"page: {page}" in capsys.readouterr().out
    assert list(Elements(page.read_text(encoding="utf-8")).figures) == [
        "relative shift by prompt",
        "text_encoder penultimate",
        "text_encoder_2 penultimate",
    ]
