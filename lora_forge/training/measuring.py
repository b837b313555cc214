"""Losses that are evaluated and not trained: what the objective of one LoRA does to another's."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lora_forge.batch import ModelView
from lora_forge.choices import ChosenTerm
from lora_forge.effect.probe import LossValues
from lora_forge.errors import LoraForgeError, blaming
from lora_forge.training.objective import Objective, Term

DRAWS = 4  # evaluations that are averaged of losses that see noise


def build_terms(chosen: Sequence[ChosenTerm]) -> list[Term]:
    """Terms of an objective, each with a loss made anew."""
    return [Term(t.label, t.weight, t.needs, t.chosen.build(), t.spec.tokens == "content", t.schedule) for t in chosen]


class MeasuredLosses:
    """The losses of `--measure`, each alone, on a view that the step loop knows nothing of.

    notes: why a loss has no value; it costs no other.
    """

    def __init__(self, chosen: Sequence[ChosenTerm], view: ModelView) -> None:
        self._view = view
        self._objectives = {term.label: Objective([term], view) for term in build_terms(chosen)}
        self.notes: list[str] = []

    def values(self) -> list[LossValues]:
        """Per prompt, each loss, unweighted, of the weights that are in the slot; through the denoiser, the mean of
        several draws of noise, always the same ones, and none that a step sees. None of a loss that raised.
        """
        draws: dict[str, list[torch.Tensor]] = {label: [] for label in self._objectives}
        with torch.no_grad():
            for draw in range(1, DRAWS + 1):
                self._view.begin_evaluation(-draw)
                for label, objective in self._objectives.items():
                    if draw == 1 or not objective.terms[0].needs <= {"text"}:
                        draws[label] += self._value(label, objective)
        self._view.begin_evaluation()
        columns = {label: torch.stack(own).mean(dim=0).tolist() if own else None for label, own in draws.items()}
        return [
            {label: column[prompt] if column else None for label, column in columns.items()}
            for prompt in range(self._view.prompts)
        ]

    def changes(self, before: Sequence[LossValues]) -> list[dict[str, tuple[float | None, float | None]]]:
        """Per prompt, what each loss was and is now, by label."""
        return [
            {label: (value, after[label]) for label, value in own.items()}
            for own, after in zip(before, self.values(), strict=True)
        ]

    def _value(self, label: str, objective: Objective) -> list[torch.Tensor]:
        """One value per prompt, `(prompts,)`; none of a loss that raises, whose reason is noted."""
        try:
            with blaming(f"measured loss {label!r}"):
                return [objective.values()[label]]
        except LoraForgeError as error:
            if (note := f"measured loss {label!r} has no value: {error}") not in self.notes:
                self.notes.append(note)
            return []
