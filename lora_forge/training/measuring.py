"""Losses that are evaluated and not trained: what the objective of one LoRA does to another's."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lora_forge.batch import ModelView
from lora_forge.choices import ChosenTerm
from lora_forge.errors import blaming
from lora_forge.training.objective import Objective, Term

DRAWS = 4  # evaluations that are averaged of losses that see noise


def build_terms(chosen: Sequence[ChosenTerm]) -> list[Term]:
    """Terms of an objective, each with a loss made anew."""
    return [Term(t.label, t.weight, t.needs, t.chosen.build(), t.spec.tokens == "content", t.schedule) for t in chosen]


class MeasuredLosses:
    """The losses of `--measure`, on the prompts of one view."""

    def __init__(self, chosen: Sequence[ChosenTerm], view: ModelView) -> None:
        terms = build_terms(chosen)
        self._view = view
        self._exact = Objective([term for term in terms if term.needs <= {"text"}], view)
        self._noisy = Objective([term for term in terms if not term.needs <= {"text"}], view)
        self._labels = [term.label for term in terms]

    def values(self) -> list[dict[str, float]]:
        """Per prompt, each loss, unweighted, of the weights that are in the slot; through the denoiser, the mean of
        several draws of noise, the same ones every time.
        """
        step = self._view.step
        with torch.no_grad(), blaming("a measured loss"):
            self._view.begin_evaluation()
            sums = self._exact.values()
            for draw in range(DRAWS if self._noisy.terms else 0):
                self._view.begin_evaluation(draw + 1)
                for label, value in self._noisy.values().items():
                    sums[label] = sums.get(label, torch.zeros_like(value)) + value / DRAWS
            self._view.begin_evaluation()
        self._view.step = step  # the step loop's noise goes on as if nothing had been measured
        columns = [sums[label].tolist() for label in self._labels]
        return [dict(zip(self._labels, row, strict=True)) for row in zip(*columns, strict=True)]
