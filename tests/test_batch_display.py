"""What people see of a job while it goes on: prompts done, how fast, how long still, and every failure."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from lora_forge.cli import batch_display
from lora_forge.cli.batch_display import BatchProgress, print_state
from lora_forge.jobs.progress import JobState

BAD = {"row": 7, "error": "the prompt is empty"}


def state(made: int, failed: int = 0, *, earlier: int = 0, twice: int = 0) -> JobState:
    return JobState(prompts=20, earlier=earlier, made=made, failed=failed, twice=twice, batch_size=4)


class Scene:
    """A display on a screen of our own, and a clock that is told the time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> None:
        self.now, self.screen = 100.0, io.StringIO()
        settings = {"file": self.screen, "force_terminal": terminal, "width": 200, "color_system": None, "_environ": {}}
        monkeypatch.setattr(batch_display, "Console", lambda **_: Console(**settings))  # type: ignore[arg-type]
        monkeypatch.setattr("lora_forge.cli.batch_display.time.monotonic", lambda: self.now)

    @property
    def text(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.screen.getvalue())


def test_lines_say_how_many_are_made_how_fast_and_how_long_the_rest_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, terminal=False)
    with BatchProgress() as progress:
        progress.watch(state(4, earlier=4), [])
        scene.now += 30
        progress.watch(state(9, 1, earlier=4), [BAD])
    said = scene.text.splitlines()
    assert said[0] == "failed: row 7: the prompt is empty"
    assert re.fullmatch(r"9/20 made\s+1 failed\s+12 prompts/min\s+50 s left", said[1])


def test_lines_come_ten_seconds_apart_at_least_and_failures_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, terminal=False)
    with BatchProgress() as progress:
        progress.watch(state(0), [])
        for made in range(1, 12):
            scene.now += 1
            progress.watch(state(made), [BAD] if made == 3 else [])
    assert [line.split()[0] for line in scene.text.splitlines()] == ["failed:", "10/20"]


def test_on_a_terminal_a_bar_counts_what_is_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, terminal=True)
    with BatchProgress() as progress:
        progress.watch(state(0), [])
        scene.now += 60
        progress.watch(state(5, 1), [BAD])
    assert "failed: row 7: the prompt is empty" in scene.text
    last = scene.text.rpartition("6/20")
    assert last[1]
    assert re.match(r"\s+1 failed\s+6 prompts/min\s+2 min left", last[2])


def test_where_steps_are_not_heard_the_bar_says_that_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, terminal=True)
    with BatchProgress() as progress:
        progress.watch(state(3, earlier=3), [])
        assert "training" not in scene.text
        scene.now += 1
        progress.watch(state(4, earlier=3), [])
    assert "training" in scene.text


@pytest.mark.parametrize(
    ("ended", "words"),
    [
        (state(20), "out: 20 made"),
        (state(20, earlier=20), "out: 0 made now, 20 before"),
        (state(18, 2, earlier=5), "out: 13 made now, 5 before; 2 failed, manifest.jsonl says why"),
        (state(20, twice=1), "out: 20 made; 1 row repeats another"),
        (state(20, twice=2), "out: 20 made; 2 rows repeat another"),
    ],
)
def test_the_last_line_says_what_became_of_the_job(
    monkeypatch: pytest.MonkeyPatch, ended: JobState, words: str
) -> None:
    scene = Scene(monkeypatch, terminal=False)
    print_state(ended, "out")
    assert scene.text == f"{words}\n"
