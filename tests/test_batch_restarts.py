"""`lora-forge batch` begun again after its input, folder or machine has changed; what ends a job, and what does not."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lora_forge.cli.main import main

FAST = ("--model", "tiny_sdxl", "--iterations", "2", "--threads", "1", "--batch-size", "2")
PLUGIN = """
import torch
from lora_forge import LossSpec, hookimpl

def picky(batch):
    if any("bad" in text for text in next(iter(batch.texts.values()))):
        raise ValueError("a bad prompt")
    return sum(out.pooled.square().mean(1) for out in batch.adapted().values())

@hookimpl
def lora_forge_losses():
    yield LossSpec(name="picky", summary="for a test", factory=picky)

@hookimpl
def lora_forge_run_started(event):
    print("started", event.run.prompt)

@hookimpl
def lora_forge_run_finished(event):
    print("finished", event.run.prompt)
    raise OSError("no room for notes")
"""

ELSEWHERE = """
import os, pickle, tempfile
from lora_forge import ExecutorSpec, hookimpl

def elsewhere(request):
    make_worker, before = pickle.loads(pickle.dumps(request.make_worker)), os.getcwd()
    os.chdir(tempfile.mkdtemp())
    try:
        worker = make_worker()
        for task in request.tasks:
            request.report(worker.save(worker.train(task)))
        worker.close()
    finally:
        os.chdir(before)

@hookimpl
def lora_forge_executors():
    yield ExecutorSpec(name="elsewhere", summary="as if in another process", factory=elsewhere)
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    Path("plugin.py").write_text(PLUGIN)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def batch(table: str, *arguments: str) -> int:
    Path("rows.csv").write_text(table)
    return main(["batch", "rows.csv", "--output-dir", "out", *FAST, *arguments])


def recorded(name: str) -> dict[str, Any]:
    with safe_open(Path("out", name), "pt") as file:
        run: dict[str, Any] = json.loads(file.metadata()["lora_forge"])["run"]
    return run


def test_a_named_row_that_asks_for_something_else_is_made_anew() -> None:
    assert batch("name,prompt,seed\nowl,an owl,1\nfox,a fox,1\n") == 0
    fox = Path("out/fox.safetensors").stat().st_mtime_ns
    assert batch("name,prompt,seed\nowl,a brass owl,7\nfox,a fox,1\n") == 0
    assert (recorded("owl.safetensors")["prompt"], recorded("owl.safetensors")["seed"]) == ("a brass owl", 7)
    assert Path("out/fox.safetensors").stat().st_mtime_ns == fox


def test_rows_may_be_added_and_only_those_are_made() -> None:
    assert batch("prompt\nan owl\na fox\n") == 0
    before = {path: path.stat().st_mtime_ns for path in Path("out").glob("*.safetensors")}
    assert batch("prompt\nan owl\na fox\na cup\n") == 0
    after = {path: path.stat().st_mtime_ns for path in Path("out").glob("*.safetensors")}
    assert len(after) == 3
    assert before.items() <= after.items()


def test_a_full_disk_ends_the_job_and_fails_no_prompt_for_good(capsys: pytest.CaptureFixture[str]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        assert batch("prompt\nan owl\na fox\n") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "cannot be written" in capsys.readouterr().err
    assert batch("prompt\nan owl\na fox\n") == 0


def test_what_no_prompt_is_to_blame_for_ends_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert batch("prompt\nan owl\na fox\n", "--inert", "error") == 2
    assert "--inert keep or drop" in capsys.readouterr().err
    assert batch("prompt,inert\nan owl,error\na fox,\n") == 2  # another job's folder: the shared settings differ


def test_what_a_rows_own_settings_are_to_blame_for_costs_the_row() -> None:
    assert batch("prompt,inert\nan owl,error\na fox,\n") == 1
    assert len(list(Path("out").glob("*.safetensors"))) == 1


def test_a_first_prompt_that_fails_does_not_keep_the_batch_size_from_being_chosen() -> None:
    Path("rows.csv").write_text("prompt\na bad owl\na fox\n")
    auto = ["batch", "rows.csv", "--output-dir", "out", *FAST[:-2], "--plugin", "plugin.py", "--loss", "picky"]
    assert main(auto) == 1
    assert len(list(Path("out").glob("*.safetensors"))) == 1


def test_two_rows_whose_formats_would_share_a_file_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    table = "name,prompt\nowl,an owl\nowl.diffusers,a fox\n"
    assert batch(table, "--saver", "safetensors", "--saver", "diffusers") == 1
    assert "another row's file is called 'owl.diffusers.safetensors'" in capsys.readouterr().err
    assert recorded("owl.diffusers.safetensors")["prompt"] == "an owl"


def test_a_strangers_file_is_not_replaced_by_a_row_that_was_added(capsys: pytest.CaptureFixture[str]) -> None:
    assert batch("name,prompt\nowl,an owl\n") == 0
    Path("out/mine.safetensors").write_bytes(b"mine")
    Path("out/.mine-20240101.txt").write_text("mine")
    assert batch("name,prompt\nowl,an owl\nmine,a fox\n") == 2
    assert Path("out/mine.safetensors").read_bytes() == b"mine"
    assert batch("name,prompt\nowl,an owl\nmine,a fox\n", "--overwrite") == 0
    assert Path("out/.mine-20240101.txt").exists()


def test_observers_hear_only_of_prompts_that_are_made_and_their_faults_are_told_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert batch("prompt\nan owl\na fox\n", "--plugin", "plugin.py") == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        f"{what} {one}" for what in ("started", "finished") for one in ("an owl", "a fox")
    ]
    assert printed.err.count("no room for notes") == 1
    next(Path("out").glob("a_fox*.safetensors")).unlink()
    assert batch("prompt\nan owl\na fox\n", "--plugin", "plugin.py") == 0
    assert capsys.readouterr().out.splitlines() == ["started a fox", "finished a fox"]


def test_an_output_folder_without_a_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("rows.csv").write_text("prompt\nan owl\n")
    assert main(["batch", "rows.csv", "--output-dir", "", *FAST]) == 2
    assert "has no name" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "strenght (did you mean 'strength'?)",
        "optimiser.lr (did you mean 'optimizer.lr'?)",
        "loss. (did you mean 'loss'?)",
    ],
)
def test_a_column_that_is_nearly_a_known_one_is_pointed_out(capsys: pytest.CaptureFixture[str], words: str) -> None:
    assert batch(f"prompt,{words.split()[0]}\nan owl,2\n") == 0
    assert words in capsys.readouterr().err


def test_a_worker_of_another_process_writes_into_the_folder_that_was_meant(tmp_path: Path) -> None:
    plugin = tmp_path / "elsewhere.py"
    plugin.write_text(ELSEWHERE)
    assert batch("prompt\nan owl\n", "--plugin", str(plugin), "--executor", "elsewhere") == 0
    assert len(list(Path("out").glob("*.safetensors"))) == 1


def test_begun_again_with_a_smaller_batch_size_the_same_batches_train_in_parts() -> None:
    rows = "prompt\nan owl\na fox\na cat\na hen\n"
    assert batch(rows, "--batch-size", "4") == 0
    made = {path.name: load_file(path) for path in Path("out").glob("*.safetensors")}
    for path in sorted(Path("out").glob("*.safetensors"))[:3]:
        path.unlink()
    assert batch(rows, "--batch-size", "2") == 0
    for name, tensors in made.items():
        for key, found in load_file(Path("out", name)).items():
            assert float((found - tensors[key]).norm()) <= 1e-5 * float(tensors[key].norm()), (name, key)
    lines = [json.loads(line) for line in Path("out", "manifest.jsonl").read_text().splitlines()]
    assert lines[0]["batch_size"] == 4
    assert {line["batch"]["size"] for line in lines[5:]} == {2}
