"""The objective: a weighted sum of loss terms, one value per prompt. L2 is the bank's (`Bank.add_l2`)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lora_forge.batch import Batch, ModelView
from lora_forge.contracts import Loss
from lora_forge.errors import RunFailed, blaming
from lora_forge.schedules import TermSchedule

STEPS_AT_ONCE = 1024  # whose factors go to the device together, since it has to be waited for


@dataclass(frozen=True)
class Term:
    """One loss of the objective; `label` is its name, made unique where a loss is used twice.

    content_only: it reads nothing beyond a text's end. schedule: of the weight, over the steps.
    """

    label: str
    weight: float
    needs: frozenset[str]
    loss: Loss
    content_only: bool = False
    schedule: TermSchedule = TermSchedule()


class Objective:
    """Evaluates all terms on one `ModelView`.

    content_only: whether no term, nor the denoiser, reads beyond a text's end.
    """

    def __init__(self, terms: Sequence[Term], view: ModelView) -> None:
        self.terms = tuple(terms)
        self._prompts, self._device = view.prompts, view.device
        # A denoiser is conditioned on all tokens, whatever the loss reads itself.
        self.content_only = all(term.content_only and term.needs <= {"text"} for term in terms)
        self._scheduled = any(term.schedule != TermSchedule() for term in terms)
        self._factors = torch.ones(len(self.terms), device=view.device)
        self._factors_of_steps, self._block = torch.empty(0), (0, 0)
        self._batches = [Batch(view, term.needs, term.label) for term in terms]

    def values(self) -> dict[str, torch.Tensor]:
        """Each term's value, unweighted, `(prompts,)` float32.

        Raises RunFailed when a loss raises, or returns another shape.
        """
        return {term.label: self._value(term, batch) for term, batch in zip(self.terms, self._batches, strict=True)}

    def total(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weighted sum of terms, `(prompts,)`, whatever their schedules."""
        weighted = [term.weight * values[term.label] for term in self.terms]
        return torch.stack(weighted).sum(dim=0)

    def go_to(self, step: int, iterations: int) -> None:
        """Have `trained_total` weight the terms as their schedules say for this step, counted from 1."""
        if not self._scheduled:
            return
        number, row = divmod(step - 1, STEPS_AT_ONCE)
        if self._block != (iterations, number):
            steps = range(number * STEPS_AT_ONCE + 1, min((number + 1) * STEPS_AT_ONCE, iterations) + 1)
            table = [[term.schedule.factor(each, iterations) for term in self.terms] for each in steps]
            self._block, self._factors_of_steps = (iterations, number), torch.tensor(table, device=self._device)
        self._factors.copy_(self._factors_of_steps[row])  # in place: a step that was recorded reads the same memory

    def trained_total(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What a step differentiates, `(prompts,)`: the weighted sum of terms under their schedules."""
        if not self._scheduled:
            return self.total(values)
        weighted = [
            term.weight * factor * values[term.label] for term, factor in zip(self.terms, self._factors, strict=True)
        ]
        return torch.stack(weighted).sum(dim=0)

    def _value(self, term: Term, batch: Batch) -> torch.Tensor:
        with blaming(f"loss {term.label!r}", term=term.label):
            value = term.loss(batch)
        if not isinstance(value, torch.Tensor) or value.shape != (self._prompts,):
            got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise RunFailed(
                f"loss {term.label!r} must return one value per prompt, shape ({self._prompts},); got {got}",
                term=term.label,
            )
        return value.to(self._device, torch.float32)


def backward(total: torch.Tensor) -> None:
    """Gradient of the prompts' sum, `total` `(prompts,)`, into the bank."""
    with warnings.catch_warnings():
        # One prompt's row of the bank is contiguous, a column of several is not; torch remarks on that once.
        warnings.filterwarnings("ignore", "grad and param do not obey the gradient layout contract")
        total.sum().backward()  # type: ignore[no-untyped-call]
