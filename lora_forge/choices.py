"""Names resolved: for each plugin that was chosen the spec, who supplied it, and checked options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lora_forge.config.model import ModelConfig
from lora_forge.config.run import Choice
from lora_forge.errors import LoraForgeError, PluginError, Problem
from lora_forge.options import parse_options, plain
from lora_forge.plugins import Registry, Supplied, build
from lora_forge.records import NEEDS, LossSpec
from lora_forge.schedules import TermSchedule


@dataclass(frozen=True)
class Chosen:
    """A spec, who supplied it, and the options it will be built with."""

    supplied: Supplied
    options: Any

    @property
    def name(self) -> str:
        return self.supplied.spec.name

    def build(self) -> Callable[..., Any]:
        return build(self.supplied, self.options)

    def record(self) -> dict[str, Any]:
        """Name, options and provenance, as written into the file's metadata."""
        return {**self.supplied.provenance(), "options": _portable_options(self.options)}


@dataclass(frozen=True)
class ChosenTerm:
    """A loss in the objective: its label, weight and schedule, and what it needs under its options."""

    label: str
    weight: float
    needs: frozenset[str]
    chosen: Chosen
    schedule: TermSchedule = TermSchedule()

    @property
    def spec(self) -> LossSpec:
        return cast(LossSpec, self.chosen.supplied.spec)

    def record(self) -> dict[str, Any]:
        """As written into the file's metadata."""
        schedule = {} if self.schedule == TermSchedule() else {"schedule": str(self.schedule)}
        return {"label": self.label, "weight": self.weight, **schedule, **self.chosen.record()}


def choose(registry: Registry, kind: str, choice: Choice, problems: list[Problem], *, key: str = "") -> Chosen | None:
    """The plugin of this name with checked options, or None, and the mistakes among `problems`."""
    try:
        supplied = registry.resolve(kind, choice.name)
    except LoraForgeError as error:
        problems.append(Problem(key or kind, str(error)))
        return None
    options, mistakes = parse_options(supplied.spec.options, choice.options, key=supplied.spec.name)
    problems += mistakes
    return None if mistakes else Chosen(supplied, options)


def choose_terms(
    registry: Registry, choices: Sequence[Choice], problems: list[Problem], *, key: str = "loss"
) -> tuple[ChosenTerm, ...]:
    """Losses as terms, each with a label of its own; mistakes among `problems`, under the key they were given by."""
    terms: list[ChosenTerm] = []
    for choice in choices:
        if set(choice.name) & set("+*("):
            problems.append(
                Problem(key, f"{choice.name!r} is a sum, as `compare` takes them; here each term is given by itself")
            )
            continue
        chosen = choose(registry, "loss", choice, problems, key=key)
        if chosen is None:
            continue
        spec = cast(LossSpec, chosen.supplied.spec)
        same = sum(term.chosen.name == spec.name for term in terms)
        label = f"{spec.name}#{same + 1}" if same else spec.name
        try:
            terms.append(
                ChosenTerm(label, choice.weight, _needs(spec, chosen), chosen, TermSchedule.read(choice.schedule))
            )
        except PluginError as error:
            problems.append(Problem(key, str(error)))
    return tuple(terms)


def solved(terms: Sequence[ChosenTerm]) -> bool:
    """Whether an objective is one term that has a closed form."""
    return len(terms) == 1 and terms[0].spec.closed_form and terms[0].weight > 0


def choose_savers(registry: Registry, choices: Sequence[Choice], problems: list[Problem]) -> tuple[Chosen, ...]:
    """Savers, each once; mistakes among `problems`."""
    chosen = [choose(registry, "saver", choice, problems) for choice in choices]
    names = [one.name for one in chosen if one]
    problems += [Problem("saver", f"{name!r} is given twice") for name in dict.fromkeys(names) if names.count(name) > 1]
    return tuple(one for one in chosen if one)


def with_learning_rate(registry: Registry, choice: Choice, model: ModelConfig | None) -> Choice:
    """A model config's `learning_rate` fills `lr` of an optimizer that has one, unless its `model_config` is False."""
    if model is None or model.learning_rate is None:
        return choice
    try:
        options = registry.resolve("optimizer", choice.name).spec.options
    except LoraForgeError:
        return choice  # reported where it is chosen
    if not any(
        field.name == "lr" and field.metadata.get("model_config", True) for field in dataclasses.fields(options)
    ):
        return choice
    return Choice(choice.name, {"lr": model.learning_rate, **choice.options})


def _needs(spec: LossSpec, chosen: Chosen) -> frozenset[str]:
    try:
        needs = spec.needs_for(chosen.options)
        unknown = sorted(needs - set(NEEDS))
        if unknown:
            raise ValueError(f"{', '.join(map(repr, unknown))} is no need; known: {', '.join(NEEDS)}")
        return needs
    except Exception as error:
        name = chosen.supplied.qualified_name
        raise PluginError(f"loss {name!r} cannot say what it needs: {type(error).__name__}: {error}") from error


def _portable_options(options: Any) -> dict[str, Any]:
    """An options instance as JSON-ready values; of a path of this machine, the last part only."""
    return {f.name: plain(_last_part(getattr(options, f.name))) for f in dataclasses.fields(options)}


def _last_part(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_last_part(item) for item in value]
    return value.name if isinstance(value, Path) else value
