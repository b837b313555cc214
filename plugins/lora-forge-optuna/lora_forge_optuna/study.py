"""Optuna's side of a sweep: the study in its storage, what an earlier process left of it, samplers and pruners."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, BruteForceSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from lora_forge.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_forge_optuna.metrics import Direction

SAMPLERS: Mapping[str, Callable[[int], BaseSampler]] = {
    "tpe": lambda seed: TPESampler(seed=seed),
    "random": lambda seed: RandomSampler(seed=seed),
    "grid": lambda seed: BruteForceSampler(seed=seed),
}
PRUNERS: Mapping[str, Callable[[], BasePruner]] = {"none": NopPruner, "median": MedianPruner}

# What is kept with a study, and with its trials.
ASKED, ERROR, REPLACES = "asked", "error", "replaces"


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Without Optuna's own log and warnings: what there is to say of a trial, the sweep says."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(before)


def open_study(
    storage: str, name: str, direction: Direction, asked: Mapping[str, Any], check: Callable[[], None]
) -> optuna.Study:
    """The study of this name, made if there is none, after a check; trials that were cut off are queued again.

    storage: a URL of a database, or the path of a journal file. Raises UsageError if the study was begun with something
    else than what is asked now.
    """
    if _is_begun(storage, name):
        study = optuna.load_study(storage=_storage(storage), study_name=name)
    else:
        check()
        study = optuna.create_study(storage=_storage(storage), study_name=name, direction=direction)
    now = json.loads(json.dumps(asked, default=str))
    before = study.user_attrs.get(ASKED)
    if before is None:
        study.set_user_attr(ASKED, now)
    elif before != now:
        changed = ", ".join(key for key in {**before, **now} if before.get(key) != now.get(key))
        raise UsageError(f"study {name!r} in {storage} was begun with another {changed}; give another --study")
    _queue_what_was_cut_off(study)
    return study


def _is_begun(storage: str, name: str) -> bool:
    """Raises UsageError for a storage that cannot be used."""
    try:
        there = _is_url(storage) or Path(storage).exists()
        return there and name in optuna.get_all_study_names(_storage(storage))
    except Exception as error:  # of whatever drives the database, which may not be installed
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": ")
        raise UsageError(f"--storage: {storage!r} cannot be used: {reason}") from error


def _is_url(storage: str) -> bool:
    return "://" in storage


def _storage(storage: str) -> str | JournalStorage:
    if _is_url(storage):
        return storage
    Path(storage).parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(storage))


def _queue_what_was_cut_off(study: optuna.Study) -> None:
    """A trial that still runs belongs to a process that is gone: it has failed, and its values are tried again."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    trials = study.get_trials(deepcopy=False)
    replaced = {one.user_attrs.get(REPLACES) for one in trials}
    for trial in trials:
        if state_of(trial) == "interrupted" and trial.params and trial.number not in replaced:
            study.enqueue_trial(trial.params, user_attrs={REPLACES: trial.number})


def settled(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that need not be run any more: not those that were cut off, nor those that wait."""
    return [one for one in study.get_trials(deepcopy=False) if state_of(one) in ("complete", "pruned", "failed")]


def state_of(trial: FrozenTrial) -> str:
    """`complete`, `pruned`, `failed`, `interrupted`, `running` or `waiting`."""
    if trial.state == TrialState.FAIL:  # one that failed by itself says why
        return "failed" if ERROR in trial.user_attrs else "interrupted"
    return trial.state.name.lower()


def optimize(
    study: optuna.Study,
    objective: Callable[[optuna.Trial], float],
    told: Callable[[optuna.Study, FrozenTrial], None],
    *,
    trials: int,
    sampler: str,
    pruner: str,
    seed: int,
) -> None:
    """Run what is missing of so many trials. An error costs its trial.

    The sampler is made anew for each trial, from a seed of the trial's own, so that a sweep that was cut off goes on as
    it would have gone.
    """

    def reseed(study: optuna.Study, _: FrozenTrial | None = None) -> None:
        text = f"{seed}/{len(settled(study))}"
        study.sampler = SAMPLERS[sampler](int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]))

    missing = trials - len(settled(study))
    if missing > 0:
        study.pruner = PRUNERS[pruner]()
        reseed(study)
        study.optimize(objective, n_trials=missing, callbacks=[told, reseed], catch=(Exception,))


def importances(study: optuna.Study) -> dict[str, float]:
    """Each parameter's share in what made trials good, largest first; empty where Optuna cannot tell yet.

    PED-ANOVA (arXiv:2304.10255). What Optuna warns of, it cannot tell.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            shares = PedAnovaImportanceEvaluator().evaluate(study)
        except Exception:
            return {}
    whole = sum(shares.values())
    return {name: share / whole for name, share in shares.items()} if whole else {}
