"""When a prompt's training ends before its last step, as `--stop-when` says it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lora_forge.options import Unfit

_SHARE = 1e-4  # of the objective's size that counts as a fall, where a plateau does not say


@dataclass(frozen=True)
class StopRule:
    """One rule.

    plateau: for `value` steps the objective has not fallen by more than `share` of its size. loss: it is `value` or
    less. seconds: `value` seconds of training per prompt are over; a batch of n prompts trains n times as long.
    """

    kind: str
    value: float
    share: float = _SHARE

    @classmethod
    def read(cls, text: str) -> StopRule:
        """From `plateau:STEPS`, `plateau:STEPS:SHARE`, `loss:VALUE` or `seconds:SECONDS`. Raises Unfit, in words."""
        kind, *numbers = text.split(":")
        try:
            values = [float(number) for number in numbers]
        except ValueError:
            values = []
        most = {"plateau": 2, "loss": 1, "seconds": 1}.get(kind, 0)
        if not 1 <= len(values) <= most or not all(math.isfinite(value) for value in values):
            raise Unfit(f"expected plateau:STEPS, plateau:STEPS:SHARE, loss:VALUE or seconds:SECONDS, got {text!r}")
        if kind == "plateau" and (values[0] < 1 or values[0] % 1 or values[-1] < 0):
            raise Unfit(f"a plateau is a whole number of steps from 1, and a share from 0, got {text!r}")
        if kind == "seconds" and values[0] <= 0:
            raise Unfit(f"expected more than 0 seconds, got {text!r}")
        return cls(kind, *values)
