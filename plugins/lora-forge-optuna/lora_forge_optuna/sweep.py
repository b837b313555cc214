"""A sweep, top to bottom: the space is checked, the study opened, trials run, what came of them written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

import lora_forge
from lora_forge import Session
from lora_forge.errors import OutputError, RunFailed
from lora_forge_optuna.metrics import Metric
from lora_forge_optuna.settings import OF_THE_MODEL
from lora_forge_optuna.space import Space
from lora_forge_optuna.study import ERROR, importances, open_study, optimize, quiet_optuna, settled, state_of
from lora_forge_optuna.trials import REPEATS, SECONDS, VALUES, Objective
from lora_forge_optuna.written import as_command, as_toml

TRIALS = 20
_ONLY_MEASURES = ("measure", "probe", "controls", "paraphrases")


@dataclass(frozen=True)
class Sweep:
    """What was asked for.

    trials: how many in all, with those an earlier process has run; None is every point of a grid, or 20. seeds: 0, 1, …
    so many. storage: a URL of a database, or a path; None is a journal file in the output folder. seed: the sampler's.
    """

    space: Space
    metric: Metric
    prompts: tuple[str, ...]
    seeds: int
    output_dir: Path
    trials: int | None = None
    sampler: str = "tpe"
    pruner: str = "none"
    seed: int = 0
    storage: str | None = None
    study: str = "sweep"


@dataclass(frozen=True)
class Line:
    """One trial, as it stands in `sweep.jsonl`.

    trial: from 1, where Optuna's own numbers begin at 0. value: the mean of `values`, which has one of each prompt and
    seed; of a pruned trial, of those there are. repeats: the trial with the same params that this one's values are
    from. settings: what each run was asked for, as a run config.
    """

    trial: int
    state: str
    value: float | None
    params: Mapping[str, Any]
    values: list[dict[str, Any]]
    error: str | None
    repeats: int | None
    seconds: float | None
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """lines: every trial. best: the first of those with the best value. importances: shares, largest first.

    command: a line of `lora-forge run` with the best settings, for the first prompt. config: a file of the same, for
    any. table: `sweep.jsonl`.
    """

    lines: tuple[Line, ...]
    best: Line
    importances: Mapping[str, float]
    command: str
    config: Path
    table: Path


Told = Callable[[Line, str, bool], None]  # a trial that has ended, how far the sweep is, and whether it is the best


def sweep(asked: Sweep, told: Told) -> Outcome:
    """Run what is missing of a sweep, and write `sweep.jsonl` and `best.toml`.

    Raises UsageError (and its kinds) for what cannot be done as asked, before the first trial; RunFailed if no trial
    was complete.
    """
    size = asked.space.size() if asked.sampler == "grid" else None
    trials = min(size, asked.trials or size) if size else asked.trials or TRIALS
    shared = asked.space.settings({}).as_run_config()
    with quiet_optuna(), lora_forge.load(**{key: shared[key] for key in OF_THE_MODEL if key in shared}) as session:
        study = open_study(
            asked.storage or str(asked.output_dir / "study.journal"),
            asked.study,
            asked.metric.direction,
            _record(asked),
            lambda: _check(asked, session),
        )

        def tell(study: optuna.Study, trial: FrozenTrial) -> None:
            best = trial.state == TrialState.COMPLETE and study.best_trial.number == trial.number
            told(_line(asked, trial), f"{len(settled(study))}/{trials}", best)

        objective = Objective(asked.space, asked.metric, asked.prompts, asked.seeds, session.run)
        optimize(study, objective, tell, trials=trials, sampler=asked.sampler, pruner=asked.pruner, seed=asked.seed)
        return _outcome(asked, study)


def _record(asked: Sweep) -> dict[str, Any]:
    """What must be the same in all trials of a study for their values to be comparable."""
    return {
        "run config": asked.space.settings({}).as_run_config(),
        "search": asked.space.as_text(),
        "metric": [asked.metric.name, asked.metric.direction, *asked.metric.controls],
        "prompts": asked.prompts,
        "seeds": asked.seeds,
    }


def _check(asked: Sweep, session: Session) -> None:
    """Try every choice and every end of a range, with no steps. Raises UsageError for what cannot be used."""
    for params in asked.space.corners():
        settings = asked.space.settings(params).for_session()
        given = settings.get("iterations", 0)
        steps = {"iterations": 0} if isinstance(given, int) and given >= 0 else {}  # a mistake is left where it is
        try:
            session.run(asked.prompts[0], **{**settings, **steps})
        except RunFailed:  # of this setting, perhaps; it is told where its turn comes
            continue


def _line(asked: Sweep, trial: FrozenTrial) -> Line:
    kept = trial.user_attrs
    return Line(
        trial=trial.number + 1,
        state=state_of(trial),
        value=trial.value,
        params=asked.space.typed(trial.params),
        values=kept.get(VALUES, []),
        error=kept.get(ERROR),
        repeats=kept[REPEATS] + 1 if REPEATS in kept else None,
        seconds=kept.get(SECONDS),
        settings=_of_a_run(asked, trial),
    )


def _of_a_run(asked: Sweep, trial: FrozenTrial) -> dict[str, Any]:
    config = asked.space.settings(trial.params).as_run_config()
    return {key: value for key, value in config.items() if key not in _ONLY_MEASURES}


def _outcome(asked: Sweep, study: optuna.Study) -> Outcome:
    lines = tuple(_line(asked, trial) for trial in study.get_trials(deepcopy=False))
    table, config = asked.output_dir / "sweep.jsonl", asked.output_dir / "best.toml"
    _write(table, "".join(json.dumps(asdict(line), ensure_ascii=False, default=str) + "\n" for line in lines))
    if not any(line.state == "complete" for line in lines):
        why = next((line.error for line in lines if line.error), "none has ended")
        raise RunFailed(f"no trial of {len(lines)} was complete; {why}")
    best = lines[study.best_trial.number]
    head = f"# {asked.metric.name} {best.value!r}, trial {best.trial} of {table.name}\n"
    _write(config, head + as_toml(best.settings))
    command = as_command(best.settings, asked.prompts[0])
    return Outcome(lines, best, importances(study), command, config, table)


def _write(path: Path, text: str) -> None:
    """The whole file, in place of an earlier one, or nothing. Raises OutputError."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"output {str(path)!r} cannot be written: {error.strerror}") from error
