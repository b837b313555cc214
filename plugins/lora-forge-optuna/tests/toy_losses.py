"""Losses for the tests, given as a plugin file: one whose value is known, one that fails, one that counts its runs."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

from lora_forge import LossSpec, hookimpl


@dataclass(frozen=True)
class Level:
    level: float = field(default=0.0, metadata={"help": "what it is, whatever the LoRA", "min": 0})
    bad: bool = field(default=False, metadata={"help": "is not a number"})


def level(batch, options):
    sizes = sum(out.pooled.abs().mean(1) for out in batch.adapted().values())
    return 0 * sizes + (float("nan") if options.bad else options.level)


@dataclass(frozen=True)
class Counted:
    log: Path = field(metadata={"help": "a file that gets a line each time the loss is made"})
    power: float = field(default=1.0, metadata={"help": "of the pooled vector", "above": 0})
    deadly: int = field(default=0, metadata={"help": "the process is killed when there are so many lines; 0: never"})


class CountedLoss:
    def __init__(self, options):
        self.options = options
        with options.log.open("a") as file:
            file.write("made\n")
        lines = len(options.log.read_text().splitlines())
        if (options.log.parent / "deadly").exists() and lines == options.deadly:
            os.kill(os.getpid(), signal.SIGKILL)

    def __call__(self, batch):
        return -sum(out.pooled.abs().pow(self.options.power).mean(1) for out in batch.adapted().values())


@hookimpl
def lora_forge_losses():
    yield LossSpec(name="level", summary="a number", options=Level, needs={"text"}, factory=level)
    yield LossSpec(name="counted", summary="counts runs", options=Counted, needs={"text"}, factory=CountedLoss)
