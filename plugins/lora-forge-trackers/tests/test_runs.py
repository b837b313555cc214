"""Runs that fail, runs side by side, the same run again, many steps, and prompts nobody expects."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from read_back import TRACKERS, read

import lora_forge
from lora_forge import RunResult
from lora_forge.clock import Clock
from lora_forge.config.run import read_run_config
from lora_forge.errors import RunFailed
from lora_forge.model import open_model
from lora_forge.plan import Request, make_plan
from lora_forge.plugins import discover
from lora_forge.runner import forge

HOSTILE = (
    "an owl 🦉 of brass\r\nrank: 9\n\n# title\n<script>alert(1)</script> ../../etc\t%s {x} \x00é " + "long " * 1500
)


def test_a_run_that_fails_is_marked_as_failed_with_its_error_and_keeps_its_good_steps(folder: Path) -> None:
    with pytest.raises(RunFailed) as caught:
        lora_forge.run("an owl", "tiny_sdxl", iterations=5, loss="nan_at_third", plugins=[folder / "nan_at_third.py"])
    assert not hasattr(caught.value, "__notes__"), "a tracker raised"
    for tracker in TRACKERS:
        (one,) = read(tracker, folder)
        assert one.ended == "failed", tracker
        assert one.error, tracker
        assert "RunFailed: nan_at_third became NaN at step 3" in one.error, tracker
        assert [step for step, _ in one.metrics["loss"]] == [1, 2], tracker
        assert "loss_after" not in one.summary, tracker
        assert one.files == [], tracker
    assert read("mlflow", folder)[0].about["status"] == "FAILED"


def test_ctrl_c_ends_the_run_and_its_logs(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        lora_forge.run("an owl", "tiny_sdxl", iterations=5, plugins=[folder / "impatient.py"])
    for tracker in TRACKERS:
        (one,) = read(tracker, folder)
        assert (one.ended, one.error) == ("failed", "KeyboardInterrupt"), tracker
    assert read("mlflow", folder)[0].about["status"] == "KILLED"


def test_prompts_side_by_side_are_runs_of_their_own_with_their_own_values(folder: Path) -> None:
    results = together("a brass fox", "an owl", outputs=folder)
    assert results[0].run.batch_id == results[1].run.batch_id
    for tracker in TRACKERS:
        logs = read(tracker, folder)
        assert [one.prompt for one in logs] == ["a brass fox", "an owl"], tracker
        for one, result in zip(logs, results, strict=True):
            assert [step for step, _ in one.metrics["loss"]] == [1, 2, 3], tracker
            expected = pytest.approx([values.loss for values in result.steps], rel=1e-6)
            assert [value for _, value in one.metrics["loss"]] == expected, tracker
            assert one.summary["loss_after"] == pytest.approx(result.loss_after, rel=1e-6), tracker
            assert one.parameters["run_id"] == result.run.id, tracker
            assert [path.name for path in one.files] == [f"{one.prompt}.safetensors"], tracker
            assert one.ended == "well", tracker


def test_one_prompt_twice_side_by_side_is_one_run(folder: Path) -> None:
    one, other = together("an owl", "an owl")
    assert one.run.id == other.run.id
    for tracker in TRACKERS:
        (log,) = read(tracker, folder)
        assert [step for step, _ in log.metrics["loss"]] == [1, 2, 3], tracker
        assert log.ended == "well", tracker


def test_the_same_run_again_in_one_process_is_logged_again(folder: Path) -> None:
    for _ in range(2):
        lora_forge.run("an owl", "tiny_sdxl", iterations=3)
    for tracker, runs in (("tensorboard", 1), ("mlflow", 2), ("wandb", 2)):
        logs = read(tracker, folder)
        assert len(logs) == runs, tracker
        for one in logs:
            assert [step for step, _ in one.metrics["loss"]] == [1, 2, 3], tracker
            assert "loss_after" in one.summary, tracker
            assert one.ended == "well", tracker


def test_a_prompt_that_is_long_and_strange_is_logged_as_it_is(folder: Path) -> None:
    result = lora_forge.run(HOSTILE, "tiny_sdxl", iterations=1)
    assert [warning for warning in result.warnings if "trackers" in warning] == []
    (board,), (mlflow,), (wandb,) = (read(tracker, folder) for tracker in TRACKERS)
    assert board.prompt == wandb.prompt == board.parameters["prompt"] == HOSTILE
    assert len(mlflow.prompt) == 6000
    assert mlflow.prompt == HOSTILE[:5999] + "…"
    assert mlflow.about["name"] == wandb.about["display_name"]
    assert mlflow.about["name"].startswith("an owl 🦉 of brass rank: 9 # title")
    assert len(mlflow.about["name"]) == 80


def test_a_long_run_reaches_mlflow_whole_and_in_few_requests(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("LORA_FORGE_TRACKERS", "mlflow")
    sent: list[int] = []
    log_batch = MlflowClient.log_batch

    def spy(self: MlflowClient, run_id: str, metrics: Any = (), **others: Any) -> Any:
        sent.extend([len(metrics)] if metrics else [])
        return log_batch(self, run_id, metrics=metrics, **others)

    monkeypatch.setattr(MlflowClient, "log_batch", spy)
    result = lora_forge.run("an owl", "tiny_sdxl", iterations=210, loss=["embedding_magnitude"] * 3)
    (one,) = read("mlflow", folder)
    assert one.metrics["loss"] == [(i + 1, values.loss) for i, values in enumerate(result.steps)]
    assert len(result.steps) == 210
    assert sum(sent) > 1000
    assert max(sent) <= 1000
    assert len(sent) < 20, "one request for many steps"


def test_many_hyper_parameters_reach_mlflow_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_FORGE_TRACKERS", "mlflow")
    result = lora_forge.run("an owl", "tiny_sdxl", iterations=0, loss=["embedding_magnitude"] * 40)
    assert [warning for warning in result.warnings if "trackers" in warning] == []
    (one,) = read("mlflow", folder)
    assert len(one.parameters) > 100
    assert one.parameters["loss/embedding_magnitude.40/weight"] == "1.0"


def test_what_else_is_logged_in_the_process_is_left_alone(folder: Path) -> None:
    import mlflow
    import wandb

    theirs = wandb.init(mode="offline", project="theirs", settings=wandb.Settings(silent=True, console="off"))
    mlflow.set_experiment("theirs")
    try:
        with mlflow.start_run() as active:
            lora_forge.run("an owl", "tiny_sdxl", iterations=1)
            assert mlflow.active_run().info.run_id == active.info.run_id
            assert wandb.run is not None
            assert wandb.run.id == theirs.id
            theirs.log({"still": "open"})
        assert mlflow.get_run(active.info.run_id).data.metrics == {}
    finally:
        theirs.finish()
        mlflow.set_experiment(experiment_id="0")
        os.environ.pop("MLFLOW_EXPERIMENT_ID", None)


def together(*prompts: str, outputs: Path | None = None) -> list[RunResult]:
    """Three steps of all prompts in one bank."""
    registry = discover()
    plan = make_plan(read_run_config([{"prompt": prompts[0], "model": "tiny_sdxl", "iterations": 3}]), registry)
    files = [outputs / f"{prompt}.safetensors" if outputs else None for prompt in prompts]
    requests = [Request(prompt, None, 0, file) for prompt, file in zip(prompts, files, strict=True)]
    return forge(plan, requests, open_model(plan), registry, Clock())
