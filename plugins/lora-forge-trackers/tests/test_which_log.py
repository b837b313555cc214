"""Which trackers log and where, what they cost when they do not, and what happens when one cannot."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from lora_forge_trackers.observer import is_active
from read_back import TRACKERS, read

import lora_forge

PLACES = {"tensorboard": "runs", "mlflow": "mlruns", "wandb": "wandb"}
LISTING = """
import sys
from lora_forge.cli.main import main
assert main(["plugins", "list", "--json"]) == 0
print(sorted({"torch", "tensorboard", "mlflow", "wandb"} & set(sys.modules)))
"""
ALL_TRACKERS = """
import urllib.request
import lora_forge
result = lora_forge.run("an owl", "tiny_sdxl", iterations=1)
assert not [warning for warning in result.warnings if "trackers" in warning], result.warnings
try:
    urllib.request.urlopen("https://asked.invalid/", timeout=10)
except OSError:
    pass
"""


def logged_by(folder: Path) -> list[str]:
    return [tracker for tracker, place in PLACES.items() if (folder / place).exists()]


def warnings_of(result: lora_forge.RunResult) -> list[str]:
    return [warning for warning in result.warnings if "trackers" in warning or "TRACKERS" in warning]


@pytest.mark.parametrize(
    ("value", "expected"), [("", []), ("mlflow", ["mlflow"]), (" TensorBoard ,,mlflow", ["tensorboard", "mlflow"])]
)
def test_the_variable_names_the_trackers_that_log(
    folder: Path, monkeypatch: pytest.MonkeyPatch, value: str, expected: list[str]
) -> None:
    monkeypatch.setenv("LORA_FORGE_TRACKERS", value)
    result = lora_forge.run("an owl", "tiny_sdxl", iterations=1)
    assert logged_by(folder) == expected
    assert warnings_of(result) == []


def test_an_unknown_name_is_told_of_once_with_the_known_ones(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_FORGE_TRACKERS", "tensorboard,mlflo")
    first, second = (lora_forge.run("an owl", "tiny_sdxl", iterations=1) for _ in range(2))
    (told,) = warnings_of(first)
    assert told.endswith("LORA_FORGE_TRACKERS: no tracker is named 'mlflo'; known: mlflow, tensorboard, wandb")
    assert warnings_of(second) == []
    assert logged_by(folder) == ["tensorboard"]


def test_a_library_that_is_not_installed_is_not_missed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("mlflow", "wandb"):
        monkeypatch.setitem(sys.modules, library, None)  # how Python notes that an import must fail
    result = lora_forge.run("an owl", "tiny_sdxl", iterations=1)
    assert warnings_of(result) == []
    assert logged_by(folder) == ["tensorboard"]


def test_a_tracker_asked_for_by_name_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setenv("LORA_FORGE_TRACKERS", "wandb")
    result = lora_forge.run("an owl", "tiny_sdxl", iterations=1)
    (told,) = warnings_of(result)
    assert "whose library is not installed" in told
    assert told.endswith('pip install "lora-forge-trackers[wandb]"')
    assert len(result.steps) == 1


def test_a_folder_of_logs_is_not_taken_for_the_library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_active("wandb")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(folder)])
    (folder / "wandb").mkdir()
    assert not is_active("wandb")


def test_listing_the_plugins_imports_no_tracker(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LISTING], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert all(f"lora-forge-trackers:{tracker}" in done.stdout for tracker in TRACKERS), done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_tensorboard_and_wandb_log_where_their_variables_say(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_FORGE_TRACKERS", "tensorboard,wandb")
    monkeypatch.setenv("LORA_FORGE_TENSORBOARD_DIR", str(folder / "board" / "runs"))
    (folder / "elsewhere").mkdir()
    monkeypatch.setenv("WANDB_DIR", str(folder / "elsewhere"))
    monkeypatch.setenv("WANDB_PROJECT", "owls")
    monkeypatch.setenv("WANDB_NAME", "the owl")
    lora_forge.run("an owl", "tiny_sdxl", iterations=1)
    assert logged_by(folder) == []
    assert len(read("tensorboard", folder / "board")) == 1
    (one,) = read("wandb", folder / "elsewhere")
    assert (one.about["project"], one.about["display_name"]) == ("owls", "the owl")


def test_wandb_can_be_switched_off_by_its_own_variable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_FORGE_TRACKERS", "wandb")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    result = lora_forge.run("an owl", "tiny_sdxl", iterations=1)
    assert warnings_of(result) == []
    assert read("wandb", folder) == []


def test_mlflow_logs_to_the_experiment_its_variable_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("LORA_FORGE_TRACKERS", "mlflow")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "owls")
    for prompt in ("an owl", "a brass owl"):
        lora_forge.run(prompt, "tiny_sdxl", iterations=1)
    client = MlflowClient()
    experiment = client.get_experiment_by_name("owls")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id])) == 2
    assert read("mlflow", folder) == []


def test_mlflow_logs_to_its_default_database_where_nothing_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sqlalchemy")
    pytest.importorskip("alembic")
    monkeypatch.setenv("LORA_FORGE_TRACKERS", "mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    result = lora_forge.run("an owl", "tiny_sdxl", iterations=3)
    assert warnings_of(result) == []
    assert (folder / "mlflow.db").is_file()
    (one,) = read("mlflow", folder)
    assert one.metrics["loss"] == [(i + 1, values.loss) for i, values in enumerate(result.steps)]


@pytest.mark.parametrize(
    ("tracker", "variable", "value"),
    [
        ("mlflow", "MLFLOW_TRACKING_URI", "nonsense://nowhere"),
        ("tensorboard", "LORA_FORGE_TENSORBOARD_DIR", "diary.py"),
        ("wandb", "WANDB_MODE", "sideways"),
    ],
)
def test_a_tracker_that_cannot_log_is_one_warning_and_the_others_log(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tracker: str, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    output = folder / "owl.safetensors"
    result = lora_forge.run("an owl", "tiny_sdxl", iterations=3, output=output)
    (told,) = warnings_of(result)
    assert told.startswith(f"lora-forge-trackers:{tracker} failed in lora_forge_run_started: ")
    assert output.is_file()
    monkeypatch.undo()
    for other in TRACKERS:
        if other != tracker:
            assert [one.ended for one in read(other, folder)] == ["well"], other


def test_a_tracker_that_breaks_midway_is_one_warning_and_is_not_asked_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    asked = []

    def full(*_: object) -> None:
        asked.append(1)
        raise OSError("No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    result = lora_forge.run("an owl", "tiny_sdxl", iterations=3)
    assert warnings_of(result) == [
        "lora-forge-trackers:tensorboard failed in lora_forge_step_finished: OSError: No space left on device"
    ]
    assert len(asked) == 1
    assert [one.ended for one in read("mlflow", folder)] == ["well"]


def test_nothing_is_sent_anywhere(folder: Path) -> None:
    asked: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as proxy:

        def listen() -> None:
            while True:
                try:
                    connection, _ = proxy.accept()
                except OSError:
                    return
                with connection:
                    asked.append(connection.recv(4096).split(b"\r\n")[0].decode())

        threading.Thread(target=listen, daemon=True).start()
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        # Whoever asks for a page on the net asks this proxy; and nobody may notice that it is a test.
        hidden = ("PYTEST_CURRENT_TEST", "CI", "DO_NOT_TRACK", "NO_PROXY", "no_proxy", "WANDB_", "MLFLOW_DISABLE")
        environment = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
        proxies = dict.fromkeys(("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy"), address)
        done = subprocess.run(
            [sys.executable, "-c", ALL_TRACKERS],
            capture_output=True,
            text=True,
            timeout=300,
            env=environment | proxies,
        )
        proxy.shutdown(socket.SHUT_RDWR)
    assert done.returncode == 0, done.stderr
    assert logged_by(folder) == list(TRACKERS)
    assert [line.rsplit(" ", 1)[0] for line in asked] == ["CONNECT asked.invalid:443"]
