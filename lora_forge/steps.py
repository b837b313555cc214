"""Step values: collected on the device, delivered in order and in chunks, checked for NaN and infinity."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

import torch

from lora_forge.errors import RunFailed
from lora_forge.events import RunInfo, StepFinish
from lora_forge.plugins import Registry
from lora_forge.result import Values

SECONDS_BETWEEN_DELIVERIES = 0.1


class StepLog:
    """Values of all prompts over all steps. Nobody else reads a number off the device while steps run.

    values: per prompt, the objective before each update, as far as it has been delivered.
    """

    def __init__(self, runs: Sequence[RunInfo], registry: Registry, notes: Sequence[list[str]]) -> None:
        self._runs, self._registry, self._notes = runs, registry, notes
        self.values: list[list[Values]] = [[] for _ in runs]
        self._pending: list[torch.Tensor] = []
        self._labels: list[str] = []
        self._components: list[str] = []
        self._first = 1
        self._delivered = time.monotonic()

    def record(
        self,
        step: int,
        total: torch.Tensor,
        terms: Mapping[str, torch.Tensor],
        l2: torch.Tensor,
        norms: Mapping[str, torch.Tensor],
    ) -> None:
        """Keep one step's values, each `(prompts,)`; deliver what has gathered, at most ten times a second."""
        self._labels, self._components = list(terms), list(norms)
        self._pending.append(torch.stack([total, l2, *(value.detach() for value in terms.values()), *norms.values()]))
        if time.monotonic() - self._delivered >= SECONDS_BETWEEN_DELIVERIES:
            self.deliver()

    def deliver(self) -> None:
        """Hand all pending steps to the observers, in order.

        Raises RunFailed naming the first step and term that is NaN or infinite.
        """
        if not self._pending:
            return
        chunk = torch.stack(self._pending).cpu()
        first, self._first = self._first, self._first + len(self._pending)
        self._pending.clear()
        known = 2 + len(self._labels)
        for offset, numbers in enumerate(chunk):
            norms = [dict(zip(self._components, own, strict=True)) for own in numbers[known:].T.tolist()]
            for prompt, values in enumerate(self._read(first + offset, numbers[:known])):
                self.values[prompt].append(values)
                run = self._runs[prompt]
                event = StepFinish(run, first + offset, values.loss, values.terms, values.l2, norms[prompt])
                for failure in self._registry.notify("lora_forge_step_finished", event):
                    if failure not in self._notes[prompt]:
                        self._notes[prompt].append(failure)
        self._delivered = time.monotonic()

    def read(self, step: int, total: torch.Tensor, terms: Mapping[str, torch.Tensor], l2: torch.Tensor) -> list[Values]:
        """Values outside the step loop, per prompt, checked the same way."""
        self._labels = list(terms)
        return self._read(step, torch.stack([total, l2, *terms.values()]).cpu())

    def _read(self, step: int, numbers: torch.Tensor) -> list[Values]:
        result = []
        for run, column in zip(self._runs, numbers.T.tolist(), strict=True):
            total, l2, *terms = column
            named = dict(zip(self._labels, terms, strict=True))
            for name, value in {**named, "l2": l2, "objective": total}.items():
                if not math.isfinite(value):
                    what = "NaN" if math.isnan(value) else "infinite"
                    of = f" for prompt {run.prompt!r}" if len(self._runs) > 1 else ""
                    message = f"{name} became {what} at step {step}{of}; nothing was written"
                    raise RunFailed(message, step=step, term=name)
            result.append(Values(total, named, l2))
        return result
