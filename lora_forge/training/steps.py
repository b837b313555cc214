"""Step values: collected on the device, delivered in order and in chunks, checked for NaN and infinity."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from lora_forge.errors import RunFailed
from lora_forge.events import RunInfo, StepFinish
from lora_forge.plugins import Registry
from lora_forge.result import Values
from lora_forge.training.failures import Failures

SECONDS_BETWEEN_DELIVERIES = 0.1


@dataclass(frozen=True)
class StepNumbers:
    """One step's values on the device, each `(prompts,)`, before its update: terms are unweighted.

    total: the objective with L2, whatever the terms' schedules.
    norms: per component, of the objective's gradient without that of L2.
    """

    total: torch.Tensor
    terms: Mapping[str, torch.Tensor]
    l2: torch.Tensor
    norms: Mapping[str, torch.Tensor]

    def stacked(self) -> torch.Tensor:
        """A copy, `(2 + terms + components, prompts)`."""
        return torch.stack([self.total, self.l2, *self.terms.values(), *self.norms.values()])


class StepLog:
    """Values of all prompts over all steps. Nobody else reads a number off the device while steps run.

    heard: the runs that observers are told of.
    values: per prompt, the objective before each update, as far as it has been delivered and the prompt has neither
    failed nor stopped. over: all prompts have failed or stopped, as far as that has been delivered.
    """

    def __init__(
        self,
        runs: Sequence[RunInfo],
        heard: Collection[int],
        registry: Registry,
        notes: Sequence[list[str]],
        failures: Failures,
    ) -> None:
        self._heard = frozenset(heard)
        self._runs, self._registry, self._notes, self._failures = runs, registry, notes, failures
        self.values: list[list[Values]] = [[] for _ in runs]
        self.over = False
        self._pending: list[torch.Tensor] = []
        self._labels: list[str] = []
        self._components: list[str] = []
        self._first = 1
        self._delivered = time.monotonic()

    def record(self, numbers: StepNumbers, training: torch.Tensor) -> None:
        """Keep one step's values; deliver what has gathered, at most ten times a second.

        training: the prompts, `(prompts,)` bool, that have not stopped; to others the step did not happen.
        """
        self._labels, self._components = list(numbers.terms), list(numbers.norms)
        self._pending.append(torch.cat([training[None].to(numbers.total.dtype), numbers.stacked()]))
        if time.monotonic() - self._delivered >= SECONDS_BETWEEN_DELIVERIES:
            self.deliver()

    def deliver(self) -> None:
        """Hand all pending steps to the observers, in order.

        A prompt fails with the first step and term that is NaN or infinite. Raises RunFailed when all have.
        """
        if not self._pending:
            return
        chunk = torch.stack(self._pending).cpu()
        first, self._first = self._first, self._first + len(self._pending)
        self._pending.clear()
        known = 2 + len(self._labels)
        for offset, rows in enumerate(chunk):
            training, numbers = rows[0].tolist(), rows[1:]
            values = self._read(first + offset, numbers[:known], training)
            norms = [dict(zip(self._components, own, strict=True)) for own in numbers[known:].T.tolist()]
            for prompt, run in enumerate(self._runs):
                if self._failures[prompt] or not training[prompt]:
                    continue
                own = values[prompt]
                self.values[prompt].append(own)
                if prompt not in self._heard:
                    continue
                event = StepFinish(run, first + offset, own.loss, own.terms, own.l2, norms[prompt])
                for failure in self._registry.notify("lora_forge_step_finished", event):
                    if failure not in self._notes[prompt]:
                        self._notes[prompt].append(failure)
        self.over = all(self._failures[prompt] or not counts for prompt, counts in enumerate(chunk[-1, 0].tolist()))
        self._delivered = time.monotonic()

    def read(self, step: int, numbers: StepNumbers) -> list[Values]:
        """Values outside the step loop, per prompt, checked the same way."""
        self._labels = list(numbers.terms)
        return self._read(step, numbers.stacked().cpu())

    def _read(self, step: int, numbers: torch.Tensor, counts: Sequence[float] | None = None) -> list[Values]:
        result = []
        for prompt, (total, l2, *terms) in enumerate(numbers.T.tolist()):
            named = dict(zip(self._labels, terms, strict=True))
            result.append(Values(total, named, l2))
            if counts is not None and not counts[prompt]:
                continue
            for name, value in {**named, "l2": l2, "objective": total}.items():
                if not math.isfinite(value):
                    what = "NaN" if math.isnan(value) else "infinite"
                    message = f"{name} became {what} at step {step}; nothing was written"
                    self._failures.add(prompt, RunFailed(message, step=step, term=name))
                    break
        return result
