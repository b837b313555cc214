"""A run that fails or is stopped: its exit code, one line that says why, and no file, whole or partial."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import lora_forge
from lora_forge.cli.main import main
from lora_forge.errors import RunFailed

TINY = ("run", "--prompt", "an owl", "--model", "tiny_sdxl")
PLUGIN = """
from dataclasses import dataclass

import torch
from lora_forge import LossSpec, OptimizerSpec, SaverSpec, hookimpl

@dataclass(frozen=True)
class Options:
    step: int = 3
    value: float | None = None

class Turning:
    def __init__(self, options):
        self.options, self.calls = options, 0

    def __call__(self, batch):
        self.calls += 1
        size = sum(out.last_hidden_state.square().mean((1, 2)) for out in batch.adapted().values())
        value = float("nan") if self.options.value is None else self.options.value * 1e38
        return size * value if self.calls == self.options.step else size

def half(request):
    request.path.write_bytes(b"half a file")
    raise OSError(28, "No space left on device")

def broken(request):
    request.path.write_bytes(b"half a file")
    raise KeyError("oh")

def patient(request):
    import os, signal, time
    request.path.write_bytes(b"half a file")
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)

@hookimpl
def lora_forge_losses():
    yield LossSpec(name="turning", summary="turns bad at a step", options=Options, factory=Turning)

@hookimpl
def lora_forge_savers():
    for saver in (half, broken, patient):
        yield SaverSpec(name=saver.__name__, summary="fails half way", factory=saver)
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "turning.py").write_text(PLUGIN, encoding="utf-8")
    return tmp_path


def files(folder: Path) -> list[str]:
    """Every file under a folder, but for the plugin and what Python caches of it."""
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and p.suffix not in (".pyc", ".py"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "turning became NaN at step 3"),
        (["--loss-opt", "turning.step=1"], "turning became NaN at step 1"),
        (["--loss-opt", "turning.step=6"], "turning became NaN at step 5"),  # measured once more after the last
        (["--loss-opt", "turning.value=1e3"], "turning became infinite at step 3"),
        (["--loss-opt", "turning.value=-1e3"], "turning became infinite at step 3"),
    ],
)
def test_a_loss_that_turns_nan_or_infinite_fails_the_run_and_is_named_with_its_step(
    here: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    terms = ["--plugin", "turning.py", "--loss", "embedding_magnitude", "--loss", "turning:0.5"]
    assert main([*TINY, "--iterations", "5", *terms, *options, "-o", "out/owl.safetensors"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    error = [line for line in printed.err.splitlines() if line.startswith("lora-forge: ")]
    assert error == [f"lora-forge: error: {words}; nothing was written"]
    assert "Traceback" not in printed.err
    assert files(here) == []


def test_a_failed_run_leaves_the_file_that_was_there(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "owl.safetensors").write_bytes(b"dear to someone")
    arguments = ["--plugin", "turning.py", "--loss", "turning", "-o", "owl.safetensors", "--overwrite"]
    assert main([*TINY, "--iterations", "4", *arguments]) == 1
    assert (here / "owl.safetensors").read_bytes() == b"dear to someone"
    assert files(here) == ["owl.safetensors"]


def test_the_api_raises_run_failed_with_the_step_and_the_term(here: Path) -> None:
    with lora_forge.load("tiny_sdxl", plugins=["turning.py"]) as session:
        with pytest.raises(RunFailed, match="turning became NaN at step 3") as raised:
            session.run("an owl", iterations=5, loss="turning", output="owl.safetensors")
        assert (raised.value.step, raised.value.term) == (3, "turning")
        assert session.run("an owl", iterations=1, loss="embedding_magnitude").path is None
    assert files(here) == []


@pytest.mark.parametrize(
    ("saver", "code", "words"),
    [("half", 2, "cannot be written: No space left on device"), ("broken", 1, "saver 'broken' failed: KeyError")],
)
def test_a_saver_that_fails_half_way_leaves_no_file(
    here: Path, capsys: pytest.CaptureFixture[str], saver: str, code: int, words: str
) -> None:
    arguments = ["--iterations", "0", "--plugin", "turning.py", "--saver", saver, "-o", "out/owl.safetensors"]
    assert main([*TINY, *arguments]) == code
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
    assert files(here) == []


def stderr_of_a_stopped_run(folder: Path, number: signal.Signals, *arguments: str) -> tuple[int, list[str], str]:
    """Start a long run, send it a signal once a step is told of; its exit code, stderr after that, and stdout."""
    command = [sys.executable, "-m", "lora_forge", *TINY, "--iterations", "200000", *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        for line in iter(process.stderr.readline, ""):
            if "ready" in line:
                break
        process.send_signal(number)
        out, error = process.communicate(timeout=120)
    return process.returncode, error.splitlines(), out


OBSERVER = """
import sys
from lora_forge import hookimpl

@hookimpl
def lora_forge_step_finished(event):
    if event.step == 1:
        print("ready", file=sys.stderr, flush=True)
"""


@pytest.fixture
def observer(here: Path) -> str:
    (here / "observer.py").write_text(OBSERVER, encoding="utf-8")
    return "observer.py"


@pytest.mark.parametrize(("number", "code", "word"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_a_run_that_is_stopped_says_so_in_one_line_and_leaves_no_file(
    here: Path, observer: str, number: str, code: int, word: str
) -> None:
    arguments = ["--plugin", observer, "-o", "out/owl.safetensors"]
    returned, lines, out = stderr_of_a_stopped_run(here, signal.Signals[number], *arguments)
    # A SIGINT that arrives while Python runs source out of a string ends the process by that signal at last, although
    # it was dealt with; to a shell that is 130 as well.
    by_signal = [-signal.SIGINT] if number == "SIGINT" else []
    assert returned in (code, *by_signal), lines
    said = [line for line in lines if not line.startswith("step ")]
    assert len(said) == 1, lines
    assert said[0].startswith(f"lora-forge: {word}")
    assert out == ""
    assert files(here) == []


def test_a_run_interrupted_while_its_file_is_written_leaves_no_file(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--iterations", "0", "--plugin", "turning.py", "--saver", "patient", "-o", "out/owl.safetensors"]
    assert main([*TINY, *arguments]) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("lora-forge: interrupted")
    assert files(here) == []
