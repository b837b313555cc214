"""Scaling a finished LoRA: by a factor, or until the conditioning moves by a stated share."""

from __future__ import annotations

import torch

from lora_forge.bank import Bank
from lora_forge.batch import ModelView
from lora_forge.effect.measure import conditioning_shifts
from lora_forge.errors import RunFailed
from lora_forge.plan import Plan
from lora_forge.training.failures import Failures

TOLERANCE = 1e-3
MAX_EVALUATIONS = 60
FACTOR_WORTH_A_WARNING = 100.0
LARGEST_FACTOR = 2.0**20


def scale_to_strength(plan: Plan, bank: Bank, view: ModelView, failures: Failures) -> list[float]:
    """Scale each prompt's ΔW as the run config asks; return the factors, one per prompt.

    A prompt fails when no factor gives the shift asked for. Raises RunFailed when all have.
    """
    if plan.config.target_shift is not None:
        factors = _factors_for_shift(plan.config.target_shift, bank, view, failures)
    else:
        strength = 1.0 if plan.config.strength is None else plan.config.strength
        factors = torch.full((bank.prompts,), strength)
    if bool((factors != 1).any()):
        bank.scale_result(factors)
    return [float(factor) for factor in factors]


def strength_warnings(plan: Plan, factor: float) -> tuple[str, ...]:
    """Plain words about a LoRA that had to be blown up to move the conditioning as far as asked."""
    if plan.config.target_shift is None or factor <= FACTOR_WORTH_A_WARNING:
        return ()
    return (
        f"the LoRA had hardly moved the conditioning and was scaled by {factor:.3g} to reach the target shift: "
        "what moves it may be noise; more iterations or a higher learning rate help",
    )


def _factors_for_shift(target: float, bank: Bank, view: ModelView, failures: Failures) -> torch.Tensor:
    """Small shifts grow nearly in proportion: aim by that, and bisect where the aim leaves the bracket."""
    original = bank.parameter.detach().clone()
    low, high = torch.zeros(bank.prompts), torch.full((bank.prompts,), LARGEST_FACTOR)
    factors = torch.ones(bank.prompts)
    failed = torch.tensor([failures[prompt] is not None for prompt in range(bank.prompts)])
    for _ in range(MAX_EVALUATIONS):
        shifts = _shifts_at(factors, original, bank, view)
        done = failed | ((shifts / target - 1).abs() <= TOLERANCE)
        if bool(done.all()):
            break
        short = shifts < target
        low, high = torch.where(short, factors, low), torch.where(short, high, factors)
        aimed = factors * target / shifts.clamp_min(1e-30)
        inside = (aimed > low) & (aimed < high) & torch.isfinite(shifts)
        middle = torch.where(high < LARGEST_FACTOR, (low + high) / 2, low * 4 + 1)
        wanted = torch.where(done, factors, torch.where(inside, aimed, middle))
        beyond = wanted > LARGEST_FACTOR  # they stay where they were, and the others go on
        failed, factors = failed | beyond, torch.where(beyond, factors, wanted)
    for prompt in (~done | failed).nonzero().flatten().tolist():
        message = f"no strength moves the conditioning by {target:g}; the last tried moved it by {shifts[prompt]:.3g}"
        failures.add(prompt, RunFailed(message))
    return factors


def _shifts_at(factors: torch.Tensor, original: torch.Tensor, bank: Bank, view: ModelView) -> torch.Tensor:
    with torch.no_grad():
        bank.parameter.copy_(original)
        bank.scale_result(factors)
        view.begin_evaluation()
        shifts = torch.tensor([prompt[0].relative if prompt else 0.0 for prompt in conditioning_shifts(view)])
        bank.parameter.copy_(original)
    return shifts
