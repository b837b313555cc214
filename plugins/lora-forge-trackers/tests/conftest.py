"""A folder to log to, and an environment in which nothing but the tests says where to log."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

DIARY = """
import json
from lora_forge import hookimpl

@hookimpl
def lora_forge_step_finished(event):
    with open({path!r}, "a") as diary:
        diary.write(json.dumps([event.run.id, event.step, dict(event.gradient_norms)]) + "\\n")
"""
NAN_AT_THIRD = """
from lora_forge import LossSpec, hookimpl

class NanAtThird:
    def __init__(self):
        self.calls = 0
    def __call__(self, batch):
        self.calls += 1
        value = sum(output.pooled.abs().mean(1) for output in batch.adapted().values())
        return value * (float("nan") if self.calls >= 3 else 1.0)

@hookimpl
def lora_forge_losses():
    yield LossSpec(name="nan_at_third", summary="s", factory=NanAtThird)
"""
IMPATIENT = """
from lora_forge import hookimpl

@hookimpl
def lora_forge_step_finished(event):
    if event.step == 2:
        raise KeyboardInterrupt
"""

Room = Callable[[str], Path]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    """Make a folder and go there: what is run next logs into it and nowhere else."""
    here = Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        for variable in list(os.environ):
            if variable.startswith(("WANDB_", "MLFLOW_", "LORA_FORGE_T", "LORA_FORGE_PLUGINS")):
                patch.delenv(variable)
        # MLflow's store of plain files needs no further library, and no second to make its tables.
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")

        def enter(name: str) -> Path:
            folder = tmp_path_factory.mktemp(name)
            os.chdir(folder)
            _forget_wandb()
            patch.setenv("MLFLOW_TRACKING_URI", f"file:{folder / 'mlruns'}")
            (folder / "diary.py").write_text(DIARY.format(path=str(folder / "diary.jsonl")))
            (folder / "nan_at_third.py").write_text(NAN_AT_THIRD)
            (folder / "impatient.py").write_text(IMPATIENT)
            return folder

        yield enter
    os.chdir(here)


@pytest.fixture
def folder(room: Room) -> Path:
    """A folder of the test's own, and the current one."""
    return room("log")


def _forget_wandb() -> None:
    """W&B reads its variables and the current folder once in a process, unless it is torn down."""
    if wandb := sys.modules.get("wandb"):
        wandb.teardown()
