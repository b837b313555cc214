"""The speed harness runs, and its report holds what it says. No figure is judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

from speed_closeness import compare_files, compare_losses  # noqa: E402
from speed_rates import step_rates, work_of  # noqa: E402
from speed_sides import PROMPT, batch_prompts, read_sides  # noqa: E402


def speed(folder: Path, report: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """What the harness writes and prints, of two iterations on tiny_sdxl."""
    fixed = ["--model", "tiny_sdxl", "--model-folder", str(folder), "--iterations", "2", "--threads", "1"]
    command = [sys.executable, str(BENCHMARKS / "speed.py"), *fixed, "--json", str(report), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(report.read_text(encoding="utf-8")), done.stdout


@pytest.fixture(scope="module")
def measured(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """One report of everything but growth, and what was printed."""
    sides = ["--sides", "baseline,float32,batch2", "--closeness", "--rate-seconds", "0.001"]
    return speed(tiny_folder, tmp_path_factory.mktemp("speed") / "out.json", *sides)


@pytest.mark.slow
def test_sides_are_measured_beside_the_baseline(measured: tuple[dict[str, Any], str]) -> None:
    report, printed = measured
    assert [run["side"] for run in report["runs"]] == ["baseline", "float32", "batch2"]
    for run in report["runs"]:
        assert run["error"] is None
        assert run["wall_s"] > run["seconds"]["steps"] == 2 * run["seconds_per_step"] > 0
        assert run["peak_bytes"] > 2**26
    sides = report["sides"]
    assert sides["batch2"]["wall_per_prompt_s"] == sides["batch2"]["wall_s"] / 2
    for side in sides.values():
        ratio = side["wall_per_prompt_s"] / sides["baseline"]["wall_per_prompt_s"]
        assert side["ratio"]["wall_per_prompt_s"] == pytest.approx(ratio)
    assert report["machine"]["versions"]["torch"]
    assert "| baseline |" in printed


@pytest.mark.slow
def test_the_baseline_minimizes_what_a_run_minimizes(measured: tuple[dict[str, Any], str]) -> None:
    """Before the first update, where B is zero, the losses are the same but for L2 of other random A."""
    baseline, ours = (run["losses"] for run in measured[0]["runs"][:2])
    assert baseline[0] == pytest.approx(ours[0], abs=1e-5)
    assert baseline[1] < baseline[0]
    assert ours[1] < ours[0]


@pytest.mark.slow
def test_shares_are_of_the_machines_rate_for_as_many_prompts(measured: tuple[dict[str, Any], str]) -> None:
    report, _ = measured
    rates, batch = report["rates"]["rates"]["float32"], report["sides"]["batch2"]
    assert rates.keys() == {"1", "2"}
    assert rates["2"]["best"] >= rates["2"]["once"] > 0
    flops = 2 * report["work"]["flops_per_step"]
    expected = flops / batch["seconds_per_step"] / 1e9 / rates["2"]["best"]
    assert batch["share_of_steps"]["best"] == pytest.approx(expected)


@pytest.mark.slow
def test_a_batchs_first_prompt_is_held_against_the_single_run(measured: tuple[dict[str, Any], str]) -> None:
    (closeness,) = measured[0]["closeness"]
    assert (closeness["side"], closeness["to"]) == ("batch2", "float32")
    assert closeness["losses"] < 1e-5
    for encoder in closeness["encoders"].values():
        assert encoder["cosine"] == pytest.approx(1, abs=1e-6)
        assert encoder["relative_error"] < 1e-3


@pytest.mark.slow
def test_growth_is_reported_beside_what_is_expected(tiny_folder: Path, tmp_path: Path) -> None:
    report, _ = speed(tiny_folder, tmp_path / "out.json", "--growth", "1,3", "--rate-seconds", "0")
    one, three = report["growth"]
    for part in ("bank_bytes", "result_bytes"):
        assert three[part] == 3 * one[part]
    assert one["bank_bytes"] == 4 * one["result_bytes"]
    # What is saved once for all prompts, such as masks and position embeddings, does not grow.
    assert 2 * one["saved_bytes"] < three["saved_bytes"] <= 3 * one["saved_bytes"]


def test_closeness_of_files_is_that_of_the_whole_matrices(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    deltas: list[list[np.ndarray[Any, Any]]] = []
    for name in ("one", "other"):
        tensors: dict[str, np.ndarray[Any, Any]] = {}
        own = []
        for layer, (rows, columns) in {"lora_te1_a": (6, 4), "lora_te1_b": (5, 7)}.items():
            down, up = (random.normal(size=size).astype("f4") for size in ((2, columns), (rows, 2)))
            tensors |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
            tensors[f"{layer}.alpha"] = np.array(3.0, "f4")
            own.append(3 / 2 * up.astype("f8") @ down.astype("f8"))
        save_file(tensors, tmp_path / name)
        deltas.append(own)
    found = compare_files(tmp_path / "one", tmp_path / "other")

    one, other = (np.concatenate([delta.ravel() for delta in own]) for own in deltas)
    encoder = found["text_encoder"]
    assert encoder["cosine"] == pytest.approx(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
    assert encoder["relative_error"] == pytest.approx(np.linalg.norm(one - other) / np.linalg.norm(other))
    cosines = [np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(*deltas, strict=True)]
    assert encoder["layer_cosines"]["min"] == pytest.approx(min(cosines))
    assert encoder["layers"] == 2
    assert found["text_encoder_2"]["layers"] == 0
    assert compare_losses([-1.0, -2.0], [-1.0, -2.5]) == pytest.approx(0.2)


def test_a_steps_work_and_rate_count_each_shape_as_often_as_it_occurs(tiny_folder: Path) -> None:
    work = work_of(tiny_folder)
    # 3 blocks of width 32 and 64, 4 of 48 and 96: q, k, v, out, fc1, fc2
    assert work.parameters == 3 * (4 * 32 * 32 + 2 * 32 * 64) + 4 * (4 * 48 * 48 + 2 * 48 * 96)
    assert work.flops == 4 * 77 * work.parameters

    def row(out: int, forward: float, gradient: float, packed: float) -> dict[str, Any]:
        routes = ({"plain": {"layout": "plain", "gflops": rate}} for rate in (forward, gradient))
        both = dict(zip(("forward", "gradient"), routes, strict=True))
        both["gradient"]["packed"] = {"layout": "packed", "gflops": packed}
        both["forward"]["turned"] = both["gradient"]["turned"] = {"layout": "transposed", "gflops": 1.0}
        return {"out": out, "in": 10, **both}

    rates = step_rates([row(10, 4.0, 2.0, 8.0), row(20, 4.0, 4.0, 2.0)], {(10, 10): 3, (20, 10): 1})
    seconds = {"once": 3 * 100 * (1 / 4 + 1 / 2) + 200 * (1 / 4 + 1 / 4), "best": 3 * 100 * (1 / 4 + 1 / 8) + 200 / 2}
    assert rates == {name: pytest.approx((3 * 100 + 200) * 2 / each) for name, each in seconds.items()}


def test_sides_are_read_from_their_names() -> None:
    sides = read_sides("baseline,bfloat16,batch16-bfloat16,batch4")
    assert [(side.kind, side.dtype, side.prompts) for side in sides] == [
        ("baseline", "float32", 1),
        ("run", "bfloat16", 1),
        ("batch", "bfloat16", 16),
        ("batch", "float32", 4),
    ]
    with pytest.raises(ValueError, match="'batch0' is no side"):
        read_sides("batch0")


def test_a_batch_begins_with_the_prompt_of_the_single_runs() -> None:
    prompts = batch_prompts(16)
    assert prompts[0] == PROMPT
    assert len(set(prompts)) == 16
