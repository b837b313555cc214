"""A sweep that ended early, by itself or by force, and is begun again."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from sweeps import PROMPTS, WITH_TOYS, complete, lines, sweep

SEARCH = ("--search", "loss.counted.power=0.5..2.0", "--search", "optimizer.lr=1e-3..1e-1 log")
CORNERS = 2  # runs that a new sweep begins with, to check both ends of its ranges


def arguments(folder: Path, storage: str) -> list[str]:
    log = ["--loss", "counted", "--set", f"loss.counted.log={folder / 'log'}", "--set", "loss.counted.deadly=8"]
    kept = ["--storage", f"sqlite:///{folder / 'it.db'}"] if storage == "sqlite" else []
    return [*WITH_TOYS, *log, *kept, *SEARCH]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep that nothing cut off."""
    folder = tmp_path_factory.mktemp("whole")
    assert sweep(folder, *arguments(folder, "journal"), "--trials", "12") == 0
    return folder


@pytest.mark.parametrize("storage", ["journal", "sqlite"])
def test_a_sweep_that_was_killed_goes_on_as_if_it_had_not_been(storage: str, whole: Path, tmp_path: Path) -> None:
    cut = tmp_path
    (cut / "deadly").touch()
    command = [sys.executable, "-m", "lora_forge_optuna", "--prompt", PROMPTS[0], "--model", "tiny_sdxl"]
    end = ["--set", "iterations=2", "--metric", "loss", "--output-dir", str(cut), "--trials", "12"]
    killed = subprocess.run([*command, *arguments(cut, storage), *end], capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    made = len((cut / "log").read_text().splitlines()) - CORNERS
    assert made == 6  # the last of which did not end
    (cut / "deadly").unlink()
    assert sweep(cut, *arguments(cut, storage), "--trials", "12") == 0

    assert len((cut / "log").read_text().splitlines()) == CORNERS + made + 12 - (made - 1)
    assert [line["state"] for line in lines(cut)].count("interrupted") == 1
    assert [(line["params"], line["value"]) for line in complete(cut)] == [
        (line["params"], line["value"]) for line in complete(whole)
    ]


def test_a_sweep_goes_on_with_more_trials_and_one_that_is_done_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    counted = (*WITH_TOYS, "--loss", "counted", "--set", f"loss.counted.log={log}", *SEARCH)
    assert sweep(tmp_path, *counted, "--trials", "2") == 0
    assert sweep(tmp_path, *counted, "--trials", "3") == 0
    first = capsys.readouterr().out
    assert len(log.read_text().splitlines()) == CORNERS + 3
    assert sweep(tmp_path, *counted, "--trials", "3") == 0
    assert len(log.read_text().splitlines()) == CORNERS + 3
    assert first.endswith(capsys.readouterr().out)


def test_a_grid_that_is_done_runs_nothing_and_ctrl_c_leaves_one_that_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import lora_forge

    grid = (*WITH_TOYS, "--loss", "level", "--search", "loss.level.level=1..5", "--sampler", "grid")
    run, calls = lora_forge.Session.run, []

    def interrupted(session, prompt, **settings):  # type: ignore[no-untyped-def]
        calls.append(settings)
        if len(calls) == 5:  # two corners, two trials
            raise KeyboardInterrupt
        return run(session, prompt, **settings)

    monkeypatch.setattr(lora_forge.Session, "run", interrupted)
    assert sweep(tmp_path, *grid) == 130
    assert "begun again, it goes on" in capsys.readouterr().err
    assert sweep(tmp_path, *grid) == 0
    assert sorted(line["value"] for line in complete(tmp_path)) == pytest.approx([1, 2, 3, 4, 5], abs=0.1)
    assert [line["state"] for line in lines(tmp_path)].count("interrupted") == 1
    done = len(calls)
    assert sweep(tmp_path, *grid) == 0
    assert len(calls) == done


def test_a_study_that_was_begun_with_something_else_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    level = (*WITH_TOYS, "--loss", "level", "--search", "loss.level.level=1|2", "--trials", "1")
    assert sweep(tmp_path, *level) == 0
    before = (tmp_path / "study.journal").read_bytes()
    assert sweep(tmp_path, *level, "--seeds", "2", prompts=PROMPTS) == 2
    assert "was begun with another prompts, seeds; give another --study" in capsys.readouterr().err
    assert (tmp_path / "study.journal").read_bytes() == before
    assert sweep(tmp_path, *level, "--seeds", "2", "--study", "second", prompts=PROMPTS) == 0


def test_the_study_is_one_that_optuna_reads(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'it.db'}"
    level = (*WITH_TOYS, "--loss", "level", "--search", "loss.level.level=1|2", "--sampler", "grid")
    assert sweep(tmp_path, *level, "--storage", url, "--study", "levels") == 0
    study = optuna.load_study(study_name="levels", storage=url)
    assert [trial.value for trial in study.trials] == [line["value"] for line in lines(tmp_path)]
    assert [trial.user_attrs["values"] for trial in study.trials] == [line["values"] for line in lines(tmp_path)]
