"""Workers without a model, for tests of what becomes of their tasks."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Task:
    """seconds: what training it takes. does: what it does to its worker, `die` or `raise`; `meet` waits for another."""

    number: int
    seconds: float = 0.0
    does: str = ""


@dataclass(frozen=True)
class Outcome:
    number: int
    process: int
    threads: str


class Stubborn(Exception):
    """Does not come through pickle, as its own arguments are not its class's."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what} because {why}")


class FakeWorker:
    """Leaves a file for each task it begins, `NUMBER-PROCESS-TIME`, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def train(self, task: Task) -> Any:
        (self.folder / f"{task.number}-{os.getpid()}-{time.monotonic_ns()}").touch()
        time.sleep(task.seconds)
        while task.does == "meet" and len([*self.folder.iterdir()]) < 2:
            time.sleep(0.01)
        if task.does == "die":
            os.kill(os.getpid(), 9)
        if task.does == "raise":
            raise Stubborn("it stopped", "it wanted to")
        return lambda: Outcome(task.number, os.getpid(), os.environ["OMP_NUM_THREADS"])

    def save(self, trained: Any) -> Outcome:
        made: Outcome = trained()
        return made

    def close(self) -> None:
        (self.folder / f"closed-{os.getpid()}").touch()


class CannotOpen:
    """What is raised while a worker is made."""

    def __init__(self) -> None:
        raise FileNotFoundError("this machine has no such model")
