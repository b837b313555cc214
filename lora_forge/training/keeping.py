"""Which iterate each prompt keeps, and when its training is over; decided on the device, read off it by nobody."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from lora_forge.bank import Bank
from lora_forge.config.stopping import StopRule


class Keeper:
    """Per prompt, the weights to keep: the last ones, those before it stopped, or the best.

    best: keep the iterate with the lowest objective, by the values before each update and those of the last weights.
    updates: `(prompts,)` int64, how many updates the kept weights have behind them.
    A prompt that has stopped trains on beside the others, to no effect: what it had is put back at the end.
    """

    def __init__(self, bank: Bank, rules: Sequence[StopRule], *, best: bool) -> None:
        self._bank, self._best = bank, best
        self._rules = [rule for rule in rules if rule.kind != "seconds"]
        self._seconds = min((rule.value * bank.prompts for rule in rules if rule.kind == "seconds"), default=None)
        self._start = time.monotonic()
        device = bank.parameter.device
        self.training = torch.ones(bank.prompts, dtype=torch.bool, device=device)
        self.updates = torch.zeros(bank.prompts, dtype=torch.int64, device=device)
        self._kept = bank.parameter.detach().clone() if best or self._rules else None
        self._lowest = torch.full((bank.prompts,), torch.inf, device=device)
        self._plateaus = [(self._lowest.clone(), self.updates.clone()) for _ in self._rules]

    @property
    def watches(self) -> bool:
        """Whether it needs the objective of each iterate."""
        return self._kept is not None

    def out_of_time(self) -> bool:
        """Whether the seconds that all prompts together may take are over."""
        return self._seconds is not None and time.monotonic() - self._start >= self._seconds

    def see(self, step: int, objective: torch.Tensor) -> torch.Tensor:
        """Before the update of a step, with the objective `(prompts,)` of the weights as they are.

        Returns which prompts are still in training, `(prompts,)` bool.
        """
        if self._kept is None:
            self.updates.fill_(step)
            return self.training
        stops = self._stops(objective)
        self._keep((objective < self._lowest) if self._best else stops & self.training, objective, step - 1)
        self.training = self.training & ~stops
        return self.training

    def finish(self, objective: torch.Tensor, steps: int) -> None:
        """After the last step, with the objective of the last weights: put back what is kept."""
        assert self._kept is not None, "it watches nothing"
        self._keep((objective < self._lowest) if self._best else self.training, objective, steps)
        with torch.no_grad():
            self._bank.parameter.copy_(self._kept)

    def _keep(self, better: torch.Tensor, objective: torch.Tensor, updates: int) -> None:
        assert self._kept is not None
        better = better & self.training
        self._lowest = torch.where(better, objective, self._lowest)
        self.updates = torch.where(better, updates, self.updates)
        torch.where(better[:, None], self._bank.parameter.detach(), self._kept, out=self._kept)

    def _stops(self, objective: torch.Tensor) -> torch.Tensor:
        stops = torch.zeros_like(self.training)
        for number, rule in enumerate(self._rules):
            if rule.kind == "loss":
                stops = stops | (objective <= rule.value)
                continue
            reference, waited = self._plateaus[number]
            fell = reference.isinf() | (objective < reference - rule.share * reference.abs())
            reference, waited = torch.where(fell, objective, reference), torch.where(fell, 0, waited + 1)
            self._plateaus[number] = reference, waited
            stops = stops | (waited >= rule.value)
        return stops
