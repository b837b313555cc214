"""The results of a comparison out of what its jobs wrote: a manifest for each objective."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import closing
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from lora_forge.comparison.objectives import ComparedObjective
from lora_forge.comparison.results import (
    Change,
    Cross,
    Measured,
    Objective,
    RandomControl,
    Row,
    Specificity,
)
from lora_forge.jobs.folder import names_in
from lora_forge.jobs.manifest import Manifest
from lora_forge.output import Place

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Made:
    """What the job of one objective left. lines: by prompt and seed. refused: by prompt, why it is none.

    header: the job's own line, None where the job was never begun. failure: why all that is missing is missing.
    present: the names of all that is in its folder.
    """

    objective: ComparedObjective
    header: Line | None
    lines: Mapping[tuple[str, int], Line]
    refused: Mapping[str, str]
    peak_memory: int | None
    failure: str
    present: Set[str]

    def line(self, prompt: str, seed: int) -> Line:
        """What became of a prompt and a seed; a line with an `error` alone where nothing did."""
        missing = self.refused.get(prompt) or self.failure or "was not made"
        return self.lines.get((prompt, seed), {"error": missing})


def read_made(folder: Place, objective: ComparedObjective, *, peak_memory: int | None, failure: str) -> Made:
    """Read an objective's manifest. Raises OutputError for one that cannot be read."""
    with closing(Manifest.open(folder)) as manifest:
        rows = list(manifest.rows.values())
    return Made(
        objective=objective,
        header=manifest.header,
        lines={(line["prompt"], line["seed"]): line for line in rows if "run_id" in line},
        refused={line["prompt"]: line["error"] for line in rows if "run_id" not in line},
        peak_memory=peak_memory,
        failure=failure,
        present=names_in(folder),
    )


def compared(made: Made) -> Objective:
    """An objective as the results tell of it, with its reach as its first LoRA showed it."""
    first = next((line for line in made.lines.values() if not line["error"]), None)
    components = first["effect"]["components"] if first else ()
    return Objective(
        name=made.objective.name,
        formula=made.objective.formula,
        needs=made.objective.needs,
        reach={one["component"]: (one["layers"] - one["inert"], one["layers"]) for one in components}
        if first
        else None,
        inert=tuple(first["inert"]) if first else (),
    )


def gathered(made: Sequence[Made], prompts: Iterable[str], seeds: Sequence[int]) -> tuple[Row, ...]:
    """A row for each objective, prompt and seed, in that order; those that failed too."""
    objectives = [one.objective for one in made]
    return tuple(_row(one, prompt, seed, objectives) for one in made for prompt in prompts for seed in seeds)


def _row(made: Made, prompt: str, seed: int, objectives: Sequence[ComparedObjective]) -> Row:
    line = made.line(prompt, seed)
    measured = None if line["error"] else _measured(made, line, objectives)
    return Row(made.objective.name, prompt, seed, line["error"], measured)


def _measured(made: Made, line: Line, objectives: Sequence[ComparedObjective]) -> Measured:
    before, after, probe = line["before"], line["after"], line["probe"]
    picture = picture_of(line["path"])
    return Measured(
        loss=Change(before["loss"], after["loss"]),
        terms={label: Change(value, after["terms"][label]) for label, value in before["terms"].items()},
        cross={
            one.name: Cross(*(one.value(probe[f"measured_{when}"]) for when in ("before", "after", "random")))
            for one in objectives
        },
        conditioning_shift=probe["conditioning_shift"],
        shifts=probe["shifts"],
        specificity=Specificity(**probe["specificity"]),
        delta_norm=probe["delta_norm"],
        component_norms=probe["component_norms"],
        effective_rank=probe["effective_rank"],
        random=RandomControl(probe["random"]["conditioning_shift"], Specificity(**probe["random"]["specificity"])),
        steps=tuple(line["steps"]),
        iterations=len(line["steps"]),
        seconds=line["seconds"],
        seconds_per_step=line["seconds_per_step"],
        peak_memory=made.peak_memory,
        file=f"{made.objective.folder}/{line['path']}",
        image=f"{made.objective.folder}/{picture}" if picture in made.present else None,
    )


def picture_of(file: str) -> str:
    """Where the picture of a LoRA is, if there is one: beside it."""
    return PurePosixPath(file).with_suffix(".grid.png").as_posix()
