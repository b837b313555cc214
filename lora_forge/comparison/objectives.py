"""The objectives of a comparison, with every name resolved, and what each of them is to the others' LoRAs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_forge.choices import ChosenTerm, choose_terms
from lora_forge.comparison.expressions import parse_expression, write_expression
from lora_forge.config.run import Choice
from lora_forge.errors import ConfigError, Problem, UsageError
from lora_forge.options import options_as_dict
from lora_forge.plan import short_digest
from lora_forge.plugins import Registry


@dataclass(frozen=True)
class ComparedObjective:
    """One of the objectives.

    name: its expression, written the same way whoever gave it. folder: of its LoRAs. loss: for `loss` of a run config.
    terms: each one's weight, by the label it has among the measured losses. needs: of all terms together.
    """

    name: str
    folder: str
    loss: tuple[Mapping[str, Any], ...]
    formula: str
    needs: tuple[str, ...]
    terms: Mapping[str, float]

    def value(self, measured: Mapping[str, float | None]) -> float | None:
        """The objective without L2 of measured losses, by label; None where one of them is not finite."""
        total = 0.0
        for label, weight in self.terms.items():
            value = measured[label]
            if value is None:
                return None
            total += weight * value
        return total


def read_objectives(
    expressions: Sequence[str], registry: Registry
) -> tuple[tuple[ComparedObjective, ...], tuple[Mapping[str, Any], ...]]:
    """The objectives, and every distinct loss of them all, for `measure` of a run config.

    Raises ConfigError with every mistake in them, UsageError where two are the same.
    """
    problems: list[Problem] = []
    parsed: list[tuple[Choice, ...]] = []
    for text in expressions:
        choices, mistakes = parse_expression(text)
        problems += mistakes
        parsed.append(choices)
    chosen = [choose_terms(registry, choices, problems) for choices in parsed]
    if problems:
        raise ConfigError("", list(dict.fromkeys(problems)))
    names = [write_expression(choices) for choices in parsed]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"the objective {twice!r} is given twice")

    distinct: dict[str, Choice] = {}
    for choices, terms in zip(parsed, chosen, strict=True):
        for choice, term in zip(choices, terms, strict=True):
            distinct.setdefault(_key(term), Choice(choice.name, choice.options))
    distinct = dict(sorted(distinct.items()))  # whatever the objectives' order, they are measured alike
    labels = [term.label for term in choose_terms(registry, list(distinct.values()), [])]
    label_of = dict(zip(distinct, labels, strict=True))
    objectives = [
        _objective(name, choices, terms, label_of) for name, choices, terms in zip(names, parsed, chosen, strict=True)
    ]
    measured = tuple({"name": choice.name, "options": dict(choice.options)} for choice in distinct.values())
    return tuple(objectives), measured


def _objective(
    name: str, choices: Sequence[Choice], terms: Sequence[ChosenTerm], label_of: Mapping[str, str]
) -> ComparedObjective:
    weights: dict[str, float] = {}
    for term in terms:
        label = label_of[_key(term)]
        weights[label] = weights.get(label, 0.0) + term.weight
    words = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")[:60]
    return ComparedObjective(
        name=name,
        folder=f"{words or 'objective'}-{short_digest(name)[:8]}",
        loss=tuple(vars(choice) for choice in choices),
        formula=_formula(terms),
        needs=tuple(sorted(frozenset[str]().union(*(term.needs for term in terms)))),
        terms=weights,
    )


def _formula(terms: Sequence[ChosenTerm]) -> str:
    """What the terms' specs say that they compute."""
    parts = [
        f"{'' if term.weight == 1 else f'{term.weight:g} · '}[{term.spec.formula or term.chosen.name}]"
        for term in terms
    ]
    return " + ".join(parts) if len(parts) > 1 or terms[0].weight != 1 else parts[0][1:-1]


def _key(term: ChosenTerm) -> str:
    """The same for losses of one plugin with the same options."""
    return json.dumps([term.chosen.supplied.qualified_name, options_as_dict(term.chosen.options)], sort_keys=True)
