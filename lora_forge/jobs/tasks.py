"""What a job is made of: its settings, and its prompts in batches that are composed the same way every time."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_forge.config.run import collect_run_config
from lora_forge.errors import LoraForgeError
from lora_forge.files.names import file_stem
from lora_forge.jobs.rows import Row
from lora_forge.output import Place
from lora_forge.plan import Plan, Request, make_plan
from lora_forge.plugins import Registry


@dataclass(frozen=True)
class JobSettings:
    """What all prompts of a job share, as its workers need it; can be pickled.

    layers: run config layers, as `collect_run_config` takes them. output_dir: a path or a URL.
    threads: torch's CPU threads in each worker. most: prompts of a batch that train side by side; None: all.
    """

    layers: tuple[Mapping[str, Any], ...]
    output_dir: str
    threads: int
    most: int | None = None


@dataclass(frozen=True)
class Entry:
    """One prompt of a task.

    stem: what its files are called, unique in the job. run_id: the same for the same request. wanted: its files are
    missing.
    """

    row: int
    stem: str
    run_id: str
    prompt: str
    prompt_2: str | None
    seed: int
    wanted: bool = True


@dataclass(frozen=True)
class Task:
    """One batch: prompts that are trained side by side, all with the same overrides of the job's settings."""

    number: int
    overrides: Mapping[str, Any]
    entries: tuple[Entry, ...]


class Plans:
    """The plan for each set of overrides, made once, and of those that cannot be made the reason."""

    def __init__(self, layers: Sequence[Mapping[str, Any]], registry: Registry) -> None:
        self._layers, self._registry = layers, registry
        self._made: dict[str, Plan | LoraForgeError] = {}

    def of(self, overrides: Mapping[str, Any], prompt: str, prompt_2: str | None) -> Plan:
        """The plan; the prompt in it is the first that asked. Raises what `make_plan` raises."""
        key = group_key(overrides, prompt_2)
        if key not in self._made:
            own = {"prompt": prompt, "prompt_2": prompt_2, "overwrite": True}  # whose files they are, the job knows
            config, mistakes = collect_run_config([*self._layers, overrides, own])
            try:
                self._made[key] = make_plan(config, self._registry, mistakes=mistakes)
            except LoraForgeError as error:
                self._made[key] = error
        made = self._made[key]
        if isinstance(made, LoraForgeError):
            raise made
        return made


def group_key(overrides: Mapping[str, Any], prompt_2: str | None) -> str:
    """What prompts that share a batch have in common, as text."""
    return json.dumps([dict(overrides), prompt_2 is not None], sort_keys=True)


@dataclass(frozen=True)
class Prepared:
    """A job's prompts, in the rows' order, by what they can share a batch with; and why the other rows are none.

    groups: overrides, and the entries that have them. refused: row, and why. twice: how many rows only repeat another.
    """

    groups: tuple[tuple[Mapping[str, Any], tuple[Entry, ...]], ...]
    refused: tuple[tuple[Row, str], ...]
    twice: int


def prepare(rows: Iterable[Row], plans: Plans) -> Prepared:
    """Name every row's files, and group what can be trained side by side. Rows that cannot be planned are refused."""
    groups: dict[str, tuple[Mapping[str, Any], list[Entry]]] = {}
    refused: list[tuple[Row, str]] = []
    names: dict[str, str] = {}  # files, as systems without cases see their names, and whose run's they are
    twice = 0
    for row in rows:
        try:
            if row.error:
                raise LoraForgeError(row.error)
            plan = plans.of(row.overrides, row.prompt, row.prompt_2)
        except LoraForgeError as error:
            refused.append((row, reason(error)))
            continue
        seed = plan.config.seed if row.seed is None else row.seed
        id = plan.run_id(Request(row.prompt, row.prompt_2, seed, None))
        stem = row.name or f"{file_stem(row.prompt)}-{id}"
        own = [name.casefold() for name in file_names(plan, stem)]
        taken = next((name for name in own if name in names), None)
        if taken:
            if names[taken] == id and not row.name:
                twice += 1
            else:
                refused.append((row, f"another row's file is called {taken!r}"))
            continue
        names |= dict.fromkeys(own, id)
        _, entries = groups.setdefault(group_key(row.overrides, row.prompt_2), (row.overrides, []))
        entries.append(Entry(row.number, stem, id, row.prompt, row.prompt_2, seed))
    grouped = tuple((overrides, tuple(entries)) for overrides, entries in groups.values())
    return Prepared(grouped, tuple(refused), twice)


def compose(prepared: Prepared, batch_size: int, settled: Collection[str]) -> list[Task]:
    """Batches of at most this many prompts, without those in which all are settled.

    Which prompts share a batch does not depend on what is settled, so that a job begun again computes the same.
    """
    tasks: list[Task] = []
    number = 0
    for overrides, entries in prepared.groups:
        for start in range(0, len(entries), batch_size):
            number += 1
            batch = entries[start : start + batch_size]
            wanted = tuple(dataclasses.replace(one, wanted=one.stem not in settled) for one in batch)
            if any(one.wanted for one in wanted):
                tasks.append(Task(number, overrides, wanted))
    return tasks


def output_of(plan: Plan, folder: Place, stem: str) -> Place:
    """The output that a prompt's run is given: with the first saver's suffix, so that a dot in a name is no suffix."""
    return folder / f"{stem}{plan.saver_specs[0].suffix}"


def file_names(plan: Plan, stem: str) -> list[str]:
    """The names of all files of a prompt; of one format, the LoRA's is enough to tell them from other prompts'."""
    if len(plan.savers) == 1:
        return [f"{stem}{plan.saver_specs[0].suffix}"]
    return [place.name for place, _ in plan.files(output_of(plan, Path(), stem))]


def requests_of(plan: Plan, folder: Place, entries: Sequence[Entry]) -> list[Request]:
    """A task's prompts as the runner takes them."""
    return [Request(one.prompt, one.prompt_2, one.seed, output_of(plan, folder, one.stem)) for one in entries]


def reason(error: Exception) -> str:
    """Why a row failed, in one line: what was raised on purpose says so itself."""
    text = " ".join(str(error).split())
    return text if isinstance(error, LoraForgeError) else f"{type(error).__name__}: {text}".rstrip(": ")
