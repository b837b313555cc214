"""What a sweep makes large or small: one number of a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lora_forge.errors import RunFailed, UsageError, nearest
from lora_forge_optuna.settings import Plugin, Settings

if TYPE_CHECKING:
    from lora_forge import RunResult

Direction = Literal["minimize", "maximize"]

MEASURED = "measure"
# Prompts that have nothing to do with one another, nor, it is to be hoped, with those of a sweep.
CONTROLS = (
    "a bowl of ripe cherries on a checked tablecloth",
    "portrait of an old fisherman, black and white photograph",
    "a green tractor ploughing a field, aerial view",
    "a watercolour of a lighthouse on a rocky coast",
    "isometric drawing of a tiny apartment",
    "northern lights over a frozen lake",
)
_OF_THE_PROBE: dict[str, Callable[[Any], float | None]] = {
    "specificity": lambda probe: probe.specificity.ratio,
    "conditioning_shift": lambda probe: probe.conditioning_shift,
    "effective_rank": lambda probe: probe.effective_rank,
}
_NAMES = (*_OF_THE_PROBE, "loss")


@dataclass(frozen=True)
class Metric:
    """name: as typed. controls: prompts that specificity is held against."""

    name: str
    direction: Direction
    controls: tuple[str, ...] = CONTROLS

    @property
    def loss(self) -> str:
        """The loss that is measured and not trained; "" where the metric is another."""
        return self.name.partition(":")[2]

    def prepare(self, settings: Settings) -> Settings:
        """The settings of all trials, with the measured loss among them, so that it can have options."""
        measured = (Plugin.read(self.loss, MEASURED),) if self.loss else ()
        return Settings({**settings.plugins, MEASURED: measured}, settings.scalars)

    def asks_for(self) -> dict[str, Any]:
        """Keys of a run config that have it measured."""
        if self.name not in _OF_THE_PROBE:
            return {}
        return {"probe": True, "controls": self.controls if self.name == "specificity" else ()}

    def read(self, result: RunResult) -> float:
        """Raises RunFailed for a run in which it is not known or not finite."""
        value: float | None = result.loss_after
        if self.loss:
            ((_, value),) = result.measured.values()
        elif self.name in _OF_THE_PROBE:
            value = _OF_THE_PROBE[self.name](result.probe)
        if value is None or not math.isfinite(value):
            raise RunFailed(f"{self.name} of {result.run.prompt!r} is {'not known' if value is None else value}")
        return float(value)


def read_metric(name: str, direction: str, controls: tuple[str, ...]) -> Metric:
    """Raises UsageError. direction: `auto` is down for losses and up for all else."""
    kind, colon, loss = name.partition(":")
    if not (name in _NAMES or (kind == MEASURED and loss)):
        known = (*_NAMES, f"{MEASURED}:NAME")
        raise UsageError(f"--metric: there is no {name!r}{nearest(name, known)}")
    down = direction == "min" or (direction == "auto" and (name == "loss" or bool(colon)))
    return Metric(name, "minimize" if down else "maximize", controls)
