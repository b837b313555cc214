"""`lora-forge batch`: a LoRA for each row, what a bad row costs, and what is made when a job is begun again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lora_forge.cli.main import main

PROMPTS = ("a steampunk owl", "bond", "a squirrel in a forest", "two tea cups", "a brass fox")
FAST = ("--model", "tiny_sdxl", "--iterations", "3", "--threads", "1")
PLUGIN = """
import os, signal
import torch
from lora_forge import LossSpec, SaverSpec, hookimpl
from lora_forge.builtin.savers import universal

def rows(batch):
    return [texts for texts in zip(*batch.texts.values())]

def size(batch):
    return sum(out.last_hidden_state.square().mean((1, 2)) for out in batch.adapted().values())

def turning(batch):
    bad = torch.tensor([float("nan") if "bad" in row[0] else 1.0 for row in rows(batch)])
    return size(batch) * bad

def spreading(batch):
    bad = torch.tensor(["bad" in row[0] for row in rows(batch)])
    return torch.where(bad, size(batch) * float("nan"), size(batch)) if bad.any() else size(batch)

def picky(batch):
    if any("bad" in row[0] for row in rows(batch)) and "MENDED" not in os.environ:
        raise ValueError("a bad prompt")
    return size(batch)

def hungry(batch):
    if batch.prompts > 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    return size(batch)

def deadly(request):
    if request.prompt == os.environ.get("DEADLY"):
        request.path.write_bytes(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    return universal(request)

@hookimpl
def lora_forge_losses():
    for loss in (size, turning, spreading, picky, hungry):
        yield LossSpec(name=loss.__name__, summary="for a test", factory=loss)

@hookimpl
def lora_forge_savers():
    yield SaverSpec(name="deadly", summary="for a test", factory=deadly)

@hookimpl
def lora_forge_run_finished(event):
    print("finished", event.run.prompt)

@hookimpl
def lora_forge_run_failed(event):
    print("failed", event.run.prompt)
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("plugin.py").write_text(PLUGIN)
    return tmp_path


@pytest.fixture(autouse=True)
def threads() -> Any:
    """A job sets torch's threads for its process; other tests have theirs back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def batch(*arguments: str, prompts: Sequence[str] = PROMPTS, out: str = "out", size: str = "2") -> int:
    Path("prompts.txt").write_text("\n".join(prompts))
    return main(["batch", "prompts.txt", "--output-dir", out, "--batch-size", size, *FAST, *arguments])


def lines(out: str = "out") -> dict[str, dict[str, Any]]:
    """The manifest's lines about rows, by prompt; the last counts."""
    _, *rest = map(json.loads, Path(out, "manifest.jsonl").read_text().splitlines())
    return {line["prompt"]: line for line in rest}


def files(out: str = "out") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(out).iterdir() if path.name != "manifest.jsonl"}


def test_every_prompt_gets_a_file_equal_to_its_single_run_and_a_line_in_the_manifest() -> None:
    assert batch("--seed", "7") == 0
    made = lines()
    assert list(made) == list(PROMPTS)
    assert len({line["path"] for line in made.values()}) == len(PROMPTS)
    for prompt, line in made.items():
        single = Path(f"{line['row']}.safetensors")
        assert main(["run", "--prompt", prompt, "--seed", "7", "-o", str(single), *FAST[:-2]]) == 0
        alone, together = load_file(single), load_file(Path("out", line["path"]))
        assert set(alone) == set(together)
        for key, tensor in alone.items():
            assert torch.linalg.vector_norm(together[key] - tensor) <= 1e-5 * torch.linalg.vector_norm(tensor), key
        with safe_open(single, "pt") as one, safe_open(Path("out", line["path"]), "pt") as other:
            records = [json.loads(file.metadata()["lora_forge"]) for file in (one, other)]
        assert records[0]["run"] == records[1]["run"]
        assert line["after"]["loss"] < line["before"]["loss"]
        assert line["effect"]["conditioning_shift"] == pytest.approx(records[0]["effect"]["conditioning_shift"], 1e-4)
        assert line["seconds"] > 0
        assert line["error"] is None
        assert line["files"] == [line["path"], line["path"].replace(".safetensors", ".json")]


def test_rows_that_repeat_another_are_made_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert batch("--json", prompts=["an owl", "a fox", "an owl"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["prompts"], answer["made"], answer["twice"], answer["failed"], answer["left"]) == (2, 2, 1, 0, 0)


def test_names_do_not_depend_on_the_order_of_the_rows_nor_on_the_batch_size() -> None:
    assert batch() == 0
    assert batch(prompts=PROMPTS[::-1], out="other", size="3") == 0
    assert set(files()) == set(files("other"))


def test_a_table_gives_rows_settings_of_their_own() -> None:
    table = "Prompt,Seed,Iterations,rank,optimizer.lr,Category\nan owl,3,,,,birds\na fox,,1,,,beasts\na cup,,,2,0.01,\n"
    Path("prompts.csv").write_text(table)
    assert main(["batch", "prompts.csv", "--output-dir", "out", *FAST]) == 0
    made = lines()
    assert [made[prompt]["batch"]["size"] for prompt in made] == [1, 1, 1]
    records = {}
    for prompt, line in made.items():
        with safe_open(Path("out", line["path"]), "pt") as file:
            records[prompt] = json.loads(file.metadata()["lora_forge"])["run"]
    assert [(r["seed"], r["iterations"]) for r in records.values()] == [(3, 3), (0, 1), (0, 3)]
    assert records["a cup"]["rank"] == 2
    assert records["a cup"]["optimizer"]["options"]["lr"] == 0.01
    assert made["a fox"]["overrides"] == {"iterations": 1}


def test_a_bad_row_costs_itself_alone(capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompts.jsonl").write_text('{"prompt": "an owl"}\n{"prompt": "a fox", "seed": -1}\nno JSON\n"a cup"\n')
    assert main(["batch", "prompts.jsonl", "--output-dir", "out", *FAST]) == 1
    printed = capsys.readouterr().err
    assert "row 2: seed" in printed
    assert "2 made; 2 failed" in " ".join(printed.split())
    assert len([name for name in files() if name.endswith(".safetensors")]) == 2


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        ("turning", "turning became NaN at step 1"),
        ("spreading", "spreading became NaN at step 1"),
        ("picky", "a bad prompt"),
    ],
)
def test_a_prompt_that_fails_costs_itself_alone(
    loss: str, why: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [*PROMPTS[:3], "a bad owl", PROMPTS[3]]
    assert batch("--plugin", "plugin.py", "--loss", loss, prompts=prompts, size="4") == 1
    assert why in lines()["a bad owl"]["error"]
    assert [line["error"] for line in lines().values()].count(None) == 4
    printed = capsys.readouterr().out.splitlines()
    assert sorted(printed) == sorted(["failed a bad owl", *(f"finished {p}" for p in PROMPTS[:4])])
    assert batch("--plugin", "plugin.py", "--loss", "size", prompts=prompts, size="4", out="sound") == 0
    for prompt in PROMPTS[:3]:
        made, sound = (load_file(Path(out, lines(out)[prompt]["path"])) for out in ("out", "sound"))
        for key, tensor in sound.items():
            assert torch.allclose(made[key], tensor, rtol=1e-4, atol=1e-6), key


def test_a_failed_prompt_is_tried_again_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, prompts = ("--plugin", "plugin.py", "--loss", "picky"), ["an owl", "a bad fox"]
    assert batch(*arguments, prompts=prompts) == 1
    before = files()
    monkeypatch.setenv("MENDED", "1")
    assert batch(*arguments, prompts=prompts) == 1
    assert files() == before
    assert batch(*arguments, "--retry-failed", prompts=prompts) == 0
    assert lines()["a bad fox"]["error"] is None
    assert files().items() > before.items()


def test_where_memory_runs_out_batches_are_halved_and_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert batch("--plugin", "plugin.py", "--loss", "hungry", size="4") == 0
    assert [line["batch"]["size"] for line in lines().values()] == [2, 2, 2, 2, 1]
    assert "memory ran out" in capsys.readouterr().err


def test_a_job_begun_again_makes_only_what_is_missing_and_to_the_bit() -> None:
    assert batch() == 0
    first = files()
    lost = sorted(name for name in first if name.endswith(".safetensors"))[1:3]
    kept = {path: path.stat().st_mtime_ns for path in Path("out").iterdir() if path.name not in lost}
    for name in lost:
        Path("out", name).unlink()
    assert batch() == 0
    assert files() == first
    again = {path for path, time in kept.items() if path.suffix == ".safetensors" and path.stat().st_mtime_ns != time}
    assert not again


def test_a_job_that_was_killed_and_begun_again_equals_an_undisturbed_one(here: Path) -> None:
    arguments = ["--plugin", "plugin.py", "--saver", "deadly", "--batch-size", "2", *FAST]
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    command = [sys.executable, "-m", "lora_forge", "batch", "prompts.txt", "--output-dir", "killed", *arguments]
    killed = subprocess.run(command, env={**os.environ, "DEADLY": PROMPTS[3]}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    with Path("killed", "manifest.jsonl").open("a") as manifest:
        manifest.write('{"id": "half a li')
    assert any(name.startswith(".") for name in files("killed"))
    assert main(["batch", "prompts.txt", "--output-dir", "killed", *arguments]) == 0
    assert main(["batch", "prompts.txt", "--output-dir", "whole", *arguments]) == 0
    assert files("killed") == files("whole")
    assert list(lines("killed")) == list(PROMPTS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--rank", "2"), "rank was"),
        (("--seed", "1"), "seed was 0, now 1"),
        (("--batch-size", "3"), "batch_size was 2, now 3"),
        (("--threads", "2"), "threads was 1, now 2"),
    ],
)
def test_a_folder_of_another_job_is_refused(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert batch() == 0
    before = files()
    capsys.readouterr()
    assert batch(*arguments) == 2
    assert words in capsys.readouterr().err
    assert files() == before


def test_a_job_begun_again_without_a_batch_size_keeps_its_own() -> None:
    assert batch() == 0
    assert batch(size="auto") == 0


def test_files_that_no_manifest_knows_are_not_replaced_unless_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert batch() == 0
    Path("out", "manifest.jsonl").unlink()
    before = files()
    assert batch() == 2
    assert "--overwrite replaces them" in capsys.readouterr().err
    assert batch("--overwrite") == 0
    assert files() == before


def test_the_batch_size_is_chosen_by_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_forge.jobs import batch_size

    asked = []

    def free(device: str) -> int:
        asked.append(device)
        return 2 * 5 * per_prompt

    per_prompt = 1000
    monkeypatch.setattr(batch_size, "bytes_per_prompt", lambda *_: per_prompt)
    monkeypatch.setattr(batch_size, "free_memory", free)
    assert batch(size="auto") == 0
    assert asked == ["cpu"]
    assert json.loads(Path("out", "manifest.jsonl").read_text().splitlines()[0])["batch_size"] == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "no_such"), "no_such"),
        (("--loss", "no_such"), "no_such"),
        (("--executor", "no_such"), "unknown executor 'no_such'"),
        (("--executor-opt", "a=1"), "local.a: unknown option"),
        (("--batch-size", "0"), "--batch-size takes a number from 1, or auto"),
        (("--base-model", "nowhere.safetensors"), "does not exist"),
    ],
)
def test_what_is_wrong_with_the_whole_job_is_told_before_the_first_prompt(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert batch(*arguments) == 2
    printed = capsys.readouterr().err
    assert words in printed
    assert len(printed.strip().splitlines()) == 1
    assert not Path("out").exists() or not list(Path("out").iterdir())


def test_a_job_writes_to_a_url_and_is_begun_again_there(bucket: Any) -> None:
    assert batch(out="memory://bucket/loras") == 0
    written = {path: bucket.cat(path) for path in bucket.find("/bucket/loras") if path.endswith(".safetensors")}
    assert len(written) == len(PROMPTS)
    gone = sorted(written)[0]
    bucket.rm(gone)
    assert batch(out="memory://bucket/loras") == 0
    assert bucket.cat(gone) == written[gone]
