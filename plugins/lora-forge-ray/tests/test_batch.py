"""`lora-forge batch --executor ray` makes, to the byte, the files that it makes here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lora_forge.cli.main import main

PROMPTS = ["an owl", "a brass fox", "mist", "three chairs", "a castle", "the sea"]
# A worker stops in its second batch, until it is killed; there is one such in a job.
STOPS = """
import os, pathlib, time
from lora_forge import hookimpl

batches = set()

@hookimpl
def lora_forge_step_finished(event):
    batches.add(event.run.batch_id)
    if len(batches) == 2 and event.step == 1:
        try:
            os.close(os.open({folder!r} + "/stopped", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        pathlib.Path({folder!r}, "victim").write_text(str(os.getpid()))
        time.sleep(120)
"""


def batch(folder: Path, name: str, *options: str) -> list[str]:
    """The arguments that make all prompts, two in a batch, in the folder `name`."""
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    chosen = ["--model", "tiny_sdxl", "--iterations", "2", "--batch-size", "2", "--threads", "1"]
    return ["batch", str(folder / "prompts.txt"), "--output-dir", str(folder / name), *chosen, *options]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*_lora-*")}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the built-in executor makes."""
    folder = tmp_path_factory.mktemp("local")
    subprocess.run([sys.executable, "-m", "lora_forge", *batch(folder, "out")], check=True, capture_output=True)
    assert len([name for name in files(folder / "out") if name.endswith(".safetensors")]) == len(PROMPTS)
    return files(folder / "out")


@pytest.mark.usefixtures("two_processors")
def test_a_worker_is_killed_in_the_middle_and_all_files_are_those_made_here(
    local: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "stops.py").write_text(STOPS.format(folder=str(tmp_path)))
    killed: list[int] = []

    def kill() -> None:
        victim = tmp_path / "victim"
        while not (victim.exists() and victim.read_text()):
            time.sleep(0.02)
        killed.append(int(victim.read_text()))
        os.kill(killed[0], signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    assert main(batch(tmp_path, "out", "--executor", "ray", "--plugin", str(tmp_path / "stops.py"))) == 0
    assert killed
    assert killed[0] != os.getpid()
    assert files(tmp_path / "out") == local
    told = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert sorted(line["prompt"] for line in told if "prompt" in line) == sorted(PROMPTS), "each once"


def test_a_job_on_a_cluster_of_its_own_is_stopped_and_begun_again(local: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "stops.py").write_text(STOPS.format(folder=str(tmp_path)))
    ray = ["--executor", "ray", "--executor-opt", "workers=1"]
    command = [sys.executable, "-m", "lora_forge", *batch(tmp_path, "out", *ray)]
    stops = ["--plugin", str(tmp_path / "stops.py")]
    started = subprocess.Popen([*command, *stops], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "victim").exists() or len(files(tmp_path / "out")) < 2:
        assert started.poll() is None, started.communicate()
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=60)
    assert started.returncode == 130
    assert out == ""
    assert err.splitlines()[-1] == "lora-forge: interrupted; no partial file is left"
    assert "ray" not in err.lower().replace(str(tmp_path).lower(), "")
    assert not Path(f"/proc/{(tmp_path / 'victim').read_text()}").exists()

    assert main(batch(tmp_path, "out")) == 0, "here, as it might be anywhere"
    assert files(tmp_path / "out") == local
