"""Each tracker is read back with its own library and compared with what the run returned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Room
from read_back import TRACKERS, Logged, read

import lora_forge
from lora_forge import RunResult

each_tracker = pytest.mark.parametrize("tracker", TRACKERS)
LOSSES = ["embedding_magnitude", "embedding_magnitude:0.5"]
SETTINGS: dict[str, Any] = {"iterations": 3, "seed": 7, "l2": 0.1, "rank": 3}


@pytest.fixture(scope="module", params=["tiny_sdxl", "tiny_sd15"])
def done(room: Room, request: pytest.FixtureRequest) -> tuple[Path, RunResult]:
    """A run of three steps, logged by all trackers at once, and the folder it logged to."""
    folder = room("done")
    output, diary = folder / "owl.safetensors", folder / "diary.py"
    result = lora_forge.run("an owl", request.param, loss=LOSSES, output=output, plugins=[diary], **SETTINGS)
    assert [warning for warning in result.warnings if "trackers" in warning] == []
    return folder, result


@pytest.fixture
def only(done: tuple[Path, RunResult], tracker: str) -> Logged:
    (one,) = read(tracker, done[0])
    return one


@each_tracker
def test_loss_terms_and_l2_of_every_step_are_those_of_the_result(
    only: Logged, done: tuple[Path, RunResult], tracker: str
) -> None:
    steps = done[1].steps
    assert len(steps) == 3
    expected = {
        "loss": [values.loss for values in steps],
        "l2": [values.l2 for values in steps],
        "terms/embedding_magnitude": [values.terms["embedding_magnitude"] for values in steps],
        "terms/embedding_magnitude.2": [values.terms["embedding_magnitude#2"] for values in steps],
    }
    for name, values in expected.items():
        assert [step for step, _ in only.metrics[name]] == [1, 2, 3], name
        assert [value for _, value in only.metrics[name]] == pytest.approx(values, rel=1e-6), name


@each_tracker
def test_gradient_norms_of_every_step_are_those_another_observer_heard(
    only: Logged, done: tuple[Path, RunResult], tracker: str
) -> None:
    heard = [json.loads(line) for line in (done[0] / "diary.jsonl").read_text().splitlines()]
    assert [step for _, step, _ in heard] == [1, 2, 3]
    components = list(heard[0][2])
    assert components == [one.component for one in done[1].effect.components]
    assert {f"gradient_norm/{component}" for component in components} == {n for n in only.metrics if "gradient" in n}
    for component in components:
        logged = only.metrics[f"gradient_norm/{component}"]
        assert [step for step, _ in logged] == [1, 2, 3], component
        assert [value for _, value in logged] == pytest.approx([norms[component] for _, _, norms in heard], rel=1e-6)


@each_tracker
def test_the_end_has_the_loss_before_and_after_and_the_effect(
    only: Logged, done: tuple[Path, RunResult], tracker: str
) -> None:
    result = done[1]
    shift = result.effect.shifts[0]
    unet = next(one for one in result.effect.components if one.component == "unet")
    encoder = next(one for one in result.effect.components if one.component == "text_encoder")
    assert unet.largest_relative_change is None
    expected = {
        "loss_before": result.loss_before,
        "loss_after": result.loss_after,
        "strength": result.strength,
        "effect/conditioning_shift": result.effect.conditioning_shift,
        f"effect/shift/{shift.name.replace(' ', '_')}": shift.relative,
        f"effect/cosine/{shift.name.replace(' ', '_')}": shift.cosine,
        "effect/delta_norm/text_encoder": encoder.delta_norm,
        "effect/largest_relative_change/text_encoder": encoder.largest_relative_change,
        "effect/delta_norm/unet": 0.0,
    }
    assert {name: only.summary[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert "effect/largest_relative_change/unet" not in only.summary
    assert only.ended == "well"
    assert only.error is None


@each_tracker
def test_the_hyper_parameters_are_the_record_the_file_holds(
    only: Logged, done: tuple[Path, RunResult], tracker: str
) -> None:
    result = done[1]
    record = json.loads(result.metadata["lora_forge"])["run"]
    expected = {
        "run_id": result.run.id,
        "batch_id": result.run.batch_id,
        "prompt": "an owl",
        "model": result.run.model,
        "rank": 3,
        "alpha": result.alpha,
        "iterations": 3,
        "seed": 7,
        "l2": 0.1,
        "optimizer/name": "adamw",
        "optimizer/distribution": "lora-forge",
        "optimizer/version": lora_forge.__version__,
        "optimizer/options/lr": record["optimizer"]["options"]["lr"],
        "optimizer/options/betas": json.dumps(record["optimizer"]["options"]["betas"]),
        "loss/embedding_magnitude/weight": 1.0,
        "loss/embedding_magnitude.2/weight": 0.5,
        "loss/embedding_magnitude.2/name": "embedding_magnitude",
    }
    if tracker == "mlflow":  # whose parameters are texts
        expected = {name: str(value) for name, value in expected.items()}
    assert {name: only.parameters.get(name) for name in expected} == expected
    assert not [name for name in only.parameters if name.endswith(("/kind", "/module"))]
    assert "prompt_2" not in only.parameters


@each_tracker
def test_the_file_can_be_found_from_the_log(only: Logged, done: tuple[Path, RunResult], tracker: str) -> None:
    written = done[0] / "owl.safetensors"
    (found,) = only.files
    assert found.read_bytes() == written.read_bytes()
    if tracker != "mlflow":  # whose artifact store is a place of its own
        assert found == written


def test_the_file_is_copied_to_mlflows_store_and_nowhere_else(done: tuple[Path, RunResult]) -> None:
    copies = [path.relative_to(done[0]).parts[0] for path in done[0].rglob("*.safetensors")]
    assert sorted(copies) == ["mlruns", "owl.safetensors"]


def test_a_run_goes_by_its_prompt_and_its_batch(done: tuple[Path, RunResult]) -> None:
    folder, result = done
    (board,), (mlflow,), (wandb,) = (read(tracker, folder) for tracker in TRACKERS)
    assert board.about["folder"] == result.run.id
    assert mlflow.about["name"] == wandb.about["display_name"] == "an owl"
    assert mlflow.about["lora_forge.run_id"] == result.run.id
    assert (wandb.about["project"], wandb.about["run_group"]) == ("lora-forge", result.run.batch_id)
    assert wandb.about["artifact"].name == f"lora-{result.run.id}"
    assert wandb.about["artifact"].type == "lora"


@pytest.mark.parametrize("output", ["owl", "memory://bucket/owl"])
def test_a_folder_and_a_url_are_logged_as_what_they_are(room: Room, output: str) -> None:
    folder = room(output.replace("/", "_"))
    saver = "safetensors" if "://" in output else "peft"
    place = output if "://" in output else folder / output
    result = lora_forge.run("an owl", "tiny_sdxl", output=place, saver=saver, overwrite=True, iterations=1)
    assert [warning for warning in result.warnings if "trackers" in warning] == []
    (mlflow,), (wandb,) = (read(tracker, folder) for tracker in ("mlflow", "wandb"))
    if saver == "peft":
        assert [path.name for path in mlflow.files] == ["text_encoder", "text_encoder_2", "unet"]
        assert len(wandb.files) == 6
    else:
        assert wandb.about["artifact"].name == f"lora-{result.run.id}"
        assert mlflow.files == []
