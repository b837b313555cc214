"""A closed-form loss in place of the step loop: what it solves for, checked and put into the bank."""

from __future__ import annotations

import torch

from lora_forge.bank import Bank
from lora_forge.batch import Batch, ModelView
from lora_forge.contracts import SolveRequest
from lora_forge.errors import PluginError, RunFailed, blaming
from lora_forge.training.failures import Failures
from lora_forge.training.objective import Term


def solve(term: Term, view: ModelView, bank: Bank, failures: Failures) -> None:
    """Have a loss fill the bank with its solution; layers that it leaves out stay as they are.

    A prompt whose solution is not finite fails. Raises PluginError for a loss without `solve`, RunFailed where that
    raises, or gives what fits no target layer, or when all prompts have failed.
    """
    solver = getattr(term.loss, "solve", None)
    if not callable(solver):
        raise PluginError(f"loss {term.label!r} is declared closed_form, but what its factory gives has no solve()")
    with torch.no_grad(), blaming(f"loss {term.label!r}", term=term.label):
        weights = solver(SolveRequest(Batch(view, term.needs, term.label), bank.rank, bank.alpha))
    misfits = misfit(weights, bank)
    if misfits:
        raise RunFailed(f"loss {term.label!r}: solve() {misfits}", term=term.label)
    finite = torch.ones(bank.prompts, dtype=torch.bool)
    for pair in (pair for layers in weights.values() for pair in layers.values()):
        for name in ("lora_A", "lora_B"):
            finite &= pair[name].flatten(1).isfinite().all(dim=1).cpu()
    bank.place(weights)
    with torch.no_grad():
        bank.parameter[~finite.to(bank.parameter.device)] = 0  # so that what is measured of the others goes on
    for prompt in (~finite).nonzero().flatten().tolist():
        message = f"{term.label} has no finite solution; nothing was written"
        failures.add(prompt, RunFailed(message, term=term.label))


def misfit(weights: object, bank: Bank) -> str:
    """What is wrong with the shape of a solution for this bank, in words, or ""."""
    if not isinstance(weights, dict) or not all(isinstance(layers, dict) for layers in weights.values()):
        return f"gives a {type(weights).__name__}, not LoRA weights {{component: {{layer: {{'lora_A', 'lora_B'}}}}}}"
    for component, layers in weights.items():
        for layer, pair in layers.items():
            expected = bank.pairs.get((component, layer))
            if expected is None:
                return f"gives weights for {component}.{layer}, which is no target layer"
            for name, target in expected._asdict().items():
                given = pair.get(name) if isinstance(pair, dict) else None
                if not isinstance(given, torch.Tensor) or given.shape != target.shape:
                    got = f"of shape {tuple(given.shape)}" if isinstance(given, torch.Tensor) else "missing"
                    return f"gives {component}.{layer} whose {name} is {got}, expected {tuple(target.shape)}"
    return ""
