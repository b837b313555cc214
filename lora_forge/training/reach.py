"""Reach: which layers an objective's gradient can touch. What is out of reach is inert."""

from __future__ import annotations

from collections import Counter
from functools import partial

import torch

from lora_forge.bank import Bank
from lora_forge.contracts import LayerKey
from lora_forge.errors import ObjectiveError
from lora_forge.plan import Plan


class Reach:
    """Watches the first backward pass: a layer is reached when autograd delivers a gradient to its B.

    Being part of the graph is what counts, not the gradient's size.
    """

    def __init__(self, bank: Bank) -> None:
        self._bank = bank
        self.reached: set[LayerKey] = set()
        self._handles = [
            pair.lora_B.register_post_accumulate_grad_hook(partial(self._note, key))  # type: ignore[no-untyped-call]
            for key, pair in bank.pairs.items()
        ]

    def _note(self, key: LayerKey, _: torch.Tensor) -> None:
        self.reached.add(key)

    @property
    def inert(self) -> list[LayerKey]:
        """Layers out of reach, in order."""
        return [key for key in self._bank.pairs if key not in self.reached]

    def check(self, plan: Plan) -> None:
        """After the first backward pass: stop watching, and stop if the run would be for nothing.

        Raises ObjectiveError when nothing is reached, or when inert layers are an error.
        """
        for handle in self._handles:
            handle.remove()
        if not self.reached:
            raise ObjectiveError("the objective reaches none of the target layers: nothing would be trained")
        if self.inert and plan.config.inert == "error":
            raise ObjectiveError(f"{self._in_words()} (--inert keep or drop accepts that)")

    def idle(self, prompt: int) -> list[LayerKey]:
        """Inert layers that change nothing. Others carry a change from where they started, from a file say."""
        return [key for key in self.inert if not bool(self._bank.pairs[key].lora_B.detach()[prompt].any())]

    def dropped(self, plan: Plan, prompt: int) -> list[LayerKey]:
        """Layers that a prompt's file leaves out."""
        return self.idle(prompt) if plan.config.inert == "drop" else []

    def warnings(self, plan: Plan, prompt: int) -> list[str]:
        """The plain words about inert layers."""
        if not self.inert:
            return []
        fate = {
            "keep": "they are in the file and change nothing; --inert drop leaves them out",
            "drop": "they are left out of the file",
        }[plan.config.inert]
        carrying = len(self.inert) - len(self.idle(prompt))
        if carrying:
            fate = f"{carrying} of them carry a change they started with, which only L2 and weight decay act on"
        return [f"{self._in_words()}; {fate}"]

    def _in_words(self) -> str:
        counts = Counter(component for component, _ in self.inert)
        of = Counter(component for component, _ in self._bank.pairs)
        parts = ", ".join(f"{component} ({count} of {of[component]} layers)" for component, count in counts.items())
        return f"inert: the objective cannot reach {parts}, so they are not trained"
