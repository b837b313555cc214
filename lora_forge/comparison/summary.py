"""All numbers that a report of a comparison shows, from its results alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from lora_forge.comparison.curves import Curve, curve_of
from lora_forge.comparison.results import Measured, Objective, Results, Row
from lora_forge.comparison.statistics import Interval, Paired, interval, paired_family

Reader: TypeAlias = Callable[[Measured], "float | None"]
_Values: TypeAlias = "dict[tuple[str, int], float]"

_MEASURES: dict[str, Reader] = {
    "conditioning_shift": lambda one: one.conditioning_shift,
    "specificity": lambda one: one.specificity.ratio,
    "delta_norm": lambda one: one.delta_norm,
    "effective_rank": lambda one: one.effective_rank,
}
_FURTHER: dict[str, Reader] = {
    "loss_change": lambda one: one.loss.difference,
    "shift_paraphrases": lambda one: one.specificity.paraphrases,
    "shift_controls": lambda one: one.specificity.controls,
    "shift_empty": lambda one: one.specificity.empty,
    "iterations": lambda one: one.iterations,
    "seconds": lambda one: one.seconds,
    "seconds_per_step": lambda one: one.seconds_per_step,
}
_OF_RANDOM: dict[str, Reader] = {
    "conditioning_shift": lambda one: one.random.conditioning_shift,
    "specificity": lambda one: one.random.specificity.ratio,
    "shift_paraphrases": lambda one: one.random.specificity.paraphrases,
    "shift_controls": lambda one: one.random.specificity.controls,
    "shift_empty": lambda one: one.random.specificity.empty,
}
OWN = "own_change"  # of the own objective, without L2


@dataclass(frozen=True)
class CrossCell:
    """What training one objective did to the value of another.

    change: of the value, without L2. share: the mean change as a share of what training on that other objective itself
    gave for the same prompts and seeds, and random_share the same of the random LoRAs; 1 is as far down, below 0 is up,
    None where its own training did not bring it down.
    """

    change: Interval | None
    share: float | None
    random_share: float | None


@dataclass(frozen=True)
class ObjectiveSummary:
    """One objective, over its prompts and seeds.

    errors: how many runs failed for which reason. measures: means by name, of its own change and value before too.
    random: the same of the random LoRA of equal norm in every layer. peak_memory: the largest, in bytes. cross: by the
    objective measured. against_first: by measure, and by objective measured as `cross.NAME`; empty for the first.
    against_random: by measure; `own_change` is of its own objective.
    """

    objective: Objective
    runs: int
    failed: int
    errors: Mapping[str, int]
    measures: Mapping[str, Interval | None]
    random: Mapping[str, Interval | None]
    peak_memory: int | None
    cross: Mapping[str, CrossCell]
    against_first: Mapping[str, Paired]
    against_random: Mapping[str, Paired]
    curve: Curve | None

    @property
    def name(self) -> str:
        return self.objective.name

    @property
    def moves_conditioning(self) -> bool:
        """Whether it, or the random LoRA, moved the conditioning at all."""
        shifts = (self.measures["conditioning_shift"], self.random["conditioning_shift"])
        return any(one is not None and one.mean != 0 for one in shifts)

    @property
    def told_from_random(self) -> bool:
        """Whether conditioning shift or specificity differs from that of random LoRAs of equal norm.

        Where neither moves the conditioning, its own objective is asked instead.
        """
        asked = ("conditioning_shift", "specificity") if self.moves_conditioning else (OWN,)
        return any(self.against_random[one].differs for one in asked)


@dataclass(frozen=True)
class Summary:
    """All objectives in the order of the results; the others are compared with the first."""

    objectives: tuple[ObjectiveSummary, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "objectives": [
                asdict(one)
                | {"name": one.name, "moves_conditioning": one.moves_conditioning}
                | {"told_from_random": one.told_from_random}
                for one in self.objectives
            ]
        }


def summarize(results: Results) -> Summary:
    """Raises UsageError where scipy is missing."""
    names = [one.name for one in results.header.objectives]
    rows = {name: results.of(name) for name in names}
    against_first, against_random = _against_first(rows), _against_random(rows)
    objectives = []
    for objective in results.header.objectives:
        own = rows[objective.name]
        errors = [row.error for row in results.rows if row.objective == objective.name and row.error is not None]
        memory = [row.measured.peak_memory for row in own if row.measured and row.measured.peak_memory is not None]
        readers = {**_own(objective.name), **_MEASURES, **_FURTHER}
        of_random = {**_OF_RANDOM, OWN: _random_change(objective.name)}
        objectives.append(
            ObjectiveSummary(
                objective=objective,
                runs=len(own),
                failed=len(errors),
                errors=dict(Counter(errors).most_common()),
                measures={name: interval(_values(own, reader)) for name, reader in readers.items()},
                random={name: interval(_values(own, reader)) for name, reader in of_random.items()},
                peak_memory=max(memory, default=None),
                cross={name: _cross(own, rows[name], name) for name in names},
                against_first=against_first[objective.name],
                against_random=against_random[objective.name],
                curve=curve_of(own),
            )
        )
    return Summary(tuple(objectives))


def _values(rows: Sequence[Row], reader: Reader) -> _Values:
    read = ((row, reader(row.measured)) for row in rows if row.measured is not None)
    return {(row.prompt, row.seed): value for row, value in read if value is not None}


def _own(name: str) -> dict[str, Reader]:
    def before(one: Measured) -> float | None:
        return one.cross[name].before if name in one.cross else None

    return {"own_before": before, OWN: _change(name)}


def _change(name: str) -> Reader:
    """Of the objective of this name, whoever was trained."""
    return lambda one: one.cross[name].difference if name in one.cross else None


def _random_change(name: str) -> Reader:
    def change(one: Measured) -> float | None:
        cross = one.cross.get(name)
        if cross is None or cross.random is None or cross.before is None:
            return None
        return cross.random - cross.before

    return change


def _cross(trained: Sequence[Row], measured: Sequence[Row], name: str) -> CrossCell:
    """The cell of the rows of one objective, given those of the objective that is measured."""
    change, own = _values(trained, _change(name)), _values(measured, _change(name))
    return CrossCell(interval(change), _share(change, own), _share(_values(trained, _random_change(name)), own))


def _share(change: _Values, own: _Values) -> float | None:
    common = change.keys() & own.keys()
    part = interval({key: change[key] for key in common})
    whole = interval({key: own[key] for key in common})
    return part.mean / whole.mean if part and whole and whole.mean < 0 else None


def _against_first(rows: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, Paired]]:
    """By objective and measure. The objectives of one measure are one family."""
    first, *others = rows
    readers = {**_MEASURES, **{f"cross.{name}": _change(name) for name in rows}}
    made: dict[str, dict[str, Paired]] = {name: {} for name in rows}
    for measure, reader in readers.items():
        values = {name: _values(own, reader) for name, own in rows.items()}
        family = paired_family([(values[first], values[other]) for other in others])
        for other, paired in zip(others, family, strict=True):
            made[other][measure] = paired
    return made


def _against_random(rows: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, Paired]]:
    """By objective and measure, what the trained LoRA has more than the random one.

    Shift and specificity are one family, since either tells an objective from chance; own objectives are another.
    """
    made: dict[str, dict[str, Paired]] = {name: {} for name in rows}
    for family in (("conditioning_shift", "specificity"), (OWN,)):
        asked = [(name, measure) for name in rows for measure in family]
        pairs = []
        for name, measure in asked:
            trained = _change(name) if measure == OWN else _MEASURES[measure]
            random = _random_change(name) if measure == OWN else _OF_RANDOM[measure]
            pairs.append((_values(rows[name], random), _values(rows[name], trained)))
        for (name, measure), paired in zip(asked, paired_family(pairs), strict=True):
            made[name][measure] = paired
    return made
