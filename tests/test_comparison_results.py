"""`results.jsonl`: what is written is read again, what is wrong is said in one line, and pandas gets it tidy."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from comparison_results import lifelike, measured, results
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lora_forge
from lora_forge.comparison.results import Change, Cross, Results, Row, write_results
from lora_forge.errors import OutputError, UsageError

NAMES = ("quiet", "loud + 0.1*quiet")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "results.jsonl"
    write_results(file, results(NAMES, 2, 2, lambda name, prompt, seed: "it broke" if prompt == seed == 1 else {}))
    return file


def test_what_was_written_is_read_again_from_the_file_or_its_folder(tmp_path: Path) -> None:
    written = lifelike([*NAMES, "third", "chance"], 3, 2)
    write_results(tmp_path / "results.jsonl", written)
    assert lora_forge.read_results(tmp_path / "results.jsonl") == written
    assert lora_forge.read_results(str(tmp_path)) == written
    write_results(tmp_path / "again.jsonl", lora_forge.read_results(tmp_path))
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "results.jsonl").read_bytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(prompt=st.text(), name=st.text(min_size=1), values=st.lists(st.floats(), min_size=1))
def test_any_text_and_any_numbers_come_back_and_what_is_not_finite_is_none(
    tmp_path: Path, prompt: str, name: str, values: list[float]
) -> None:
    first = values[0]
    one = measured([name], name, steps=tuple(values), cross={name: Cross(first, 0.0, 1e-300)})
    written = Results(results([name], 1, 1).header, (Row(name, prompt, 0, None, one), Row(name, prompt, 1, "no", None)))
    write_results(tmp_path / "results.jsonl", written)
    row, failed = lora_forge.read_results(tmp_path).rows
    assert row.measured
    assert (row.objective, row.prompt, failed.prompt) == (name, prompt, prompt)
    assert row.measured.steps == tuple(value if math.isfinite(value) else None for value in values)
    assert row.measured.cross[name] == Cross(first if math.isfinite(first) else None, 0.0, 1e-300)
    assert row.measured.cross[name].difference == (-first if math.isfinite(first) else None)


def test_each_line_is_as_documented(path: Path) -> None:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 1 + len(NAMES) * 4
    assert (lines[0]["format"], lines[0]["kind"], lines[0]["objectives"][1]["name"]) == (1, "comparison", NAMES[1])
    assert lines[0]["objectives"][0]["reach"]["text_encoder"] == [20, 24]
    assert lines[4] == {"objective": "quiet", "prompt": "prompt 1", "seed": 1, "error": "it broke"}
    assert lines[1]["error"] is None
    assert lines[1]["loss"] == {"before": 1.1, "after": 0.6}
    assert lines[1]["cross"]["quiet"] == {"before": 1.0, "after": 0.5, "random": 0.99}
    assert lines[1]["random"]["specificity"]["ratio"] == 1


def test_keys_that_are_not_known_are_passed_over(path: Path) -> None:
    before = lora_forge.read_results(path)
    lines = [json.loads(line) | {"new": 1} for line in path.read_text(encoding="utf-8").splitlines()]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert lora_forge.read_results(path) == before


Spoil = Callable[[list[dict[str, Any]]], Any]
SPOILT: list[tuple[Spoil, str]] = [
    (lambda lines: lines[2].pop("seed"), "line 3: 'seed' is missing"),
    (lambda lines: lines[2]["loss"].pop("after"), "line 3: 'loss.after' is missing"),
    (lambda lines: lines[1].update(conditioning_shift="far"), "line 2: 'conditioning_shift': expected a number"),
    (lambda lines: lines[1]["cross"].update(quiet=3), "line 2: 'cross.quiet': expected an object, got 3"),
    (lambda lines: lines[1].update(steps=[1, "two"]), "line 2: 'steps': expected a number"),
    (lambda lines: lines[5].update(objective="quite"), "line 6: 'quite' is not one of the objectives of line 1"),
    (lambda lines: lines[1]["cross"].update(other=lines[1]["cross"]["quiet"]), "line 2: 'other' is not one of"),
    (lambda lines: lines[0].update(format=2), "line 1: has format 2, and this lora-forge reads format 1"),
    (lambda lines: lines[0].update(kind="job"), "line 1: this is not about a comparison"),
    (lambda lines: lines[0]["objectives"][1].update(name="quiet"), "line 1: two objectives have one name"),
    (lambda lines: lines[0].update(objectives=[]), "line 1: there are no objectives"),
    (lambda lines: lines[0].update(objectives={}), "line 1: 'objectives': expected a list"),
    (lambda lines: lines[0]["objectives"][1].pop("needs"), "line 1: 'objectives.1.needs' is missing"),
]


@pytest.mark.parametrize(("spoil", "told"), SPOILT)
def test_what_is_wrong_is_said_in_one_line_that_names_the_file_and_its_line(
    path: Path, spoil: Spoil, told: str
) -> None:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    spoil(lines)
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        lora_forge.read_results(path)
    assert str(caught.value).startswith(f"{path}, {told}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"format": 1}'])
def test_what_is_no_file_of_results_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"results\.jsonl"):
        lora_forge.read_results(path)
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        lora_forge.read_results(tmp_path / "none.jsonl")


def test_a_file_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        write_results(tmp_path / "file" / "results.jsonl", results(NAMES, 1, 1))


def test_a_frame_has_a_row_per_lora_and_a_column_per_number_failed_ones_too(path: Path) -> None:
    made = lora_forge.read_results(path)
    frame = made.frame()
    assert list(frame["objective"]) == [name for name in NAMES for _ in range(4)]
    assert frame["error"].notna().sum() == 2
    for row, (_, line) in zip(made.rows, frame.iterrows(), strict=True):
        assert (line["prompt"], line["seed"]) == (row.prompt, row.seed)
        if row.measured is None:
            assert math.isnan(line["conditioning_shift"])
            continue
        assert line["loss.after"] == row.measured.loss.after
        assert line["specificity.ratio"] == row.measured.specificity.ratio
        assert line["random.specificity.own"] == row.measured.random.specificity.own
        assert line["shifts.text_encoder_2 pooled"] == row.measured.shifts["text_encoder_2 pooled"]
    assert not [name for name in frame.columns if name.startswith(("cross", "steps", "terms"))]


def test_the_other_frames_have_a_row_per_number_measured(path: Path) -> None:
    made = lora_forge.read_results(path)
    cross, terms, steps = (made.frame(table) for table in ("cross", "terms", "steps"))
    assert len(cross) == 6 * len(NAMES)
    assert set(cross.columns) == {"objective", "prompt", "seed", "measured", "before", "after", "random"}
    own = cross[cross["objective"] == cross["measured"]]
    assert (own["after"] - own["before"]).tolist() == [-0.5] * 6
    assert terms[["term", "before", "after"]].drop_duplicates().values.tolist() == [[n, 1.0, 0.5] for n in NAMES]
    assert len(steps) == 6 * 20
    assert steps.groupby("step")["value"].mean().loc[1] == 1.1
    with pytest.raises(UsageError, match="there is no table 'step'; did you mean 'steps'"):
        made.frame("step")  # type: ignore[arg-type]


def test_a_frame_without_pandas_says_how_to_get_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match=r"pip install lora-forge\[lab\]"):
        lora_forge.read_results(path).frame()


def test_reading_results_imports_nothing_heavy(path: Path) -> None:
    code = f"import sys, lora_forge; lora_forge.read_results({str(path)!r}); print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "pandas", "scipy", "numpy", "diffusers"} & set(said.split())


def test_a_row_is_either_measured_or_failed() -> None:
    with pytest.raises(ValueError, match="either"):
        Row("quiet", "an owl", 0, None, None)
    with pytest.raises(ValueError, match="either"):
        Row("quiet", "an owl", 0, "failed", measured(["quiet"], "quiet"))
    assert replace(measured(["quiet"], "quiet").loss, after=None) == Change(1.1, None)
