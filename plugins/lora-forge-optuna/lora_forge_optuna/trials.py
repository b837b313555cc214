"""One trial: a setting, a run of each prompt and seed, their mean."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from lora_forge import RunResult
from lora_forge.errors import LoraForgeError
from lora_forge_optuna.metrics import Metric
from lora_forge_optuna.space import Space
from lora_forge_optuna.study import ERROR

VALUES, SECONDS, REPEATS = "values", "seconds", "repeats"


class Objective:
    """What Optuna calls: from a trial to the metric's mean over prompts and seeds.

    run: `Session.run`. One run after another, so that a pruner may end a trial between two of them.
    """

    def __init__(
        self,
        space: Space,
        metric: Metric,
        prompts: Sequence[str],
        seeds: int,
        run: Callable[..., RunResult],
    ) -> None:
        self._space, self._metric, self._run = space, metric, run
        self._pairs = [(prompt, seed) for prompt in prompts for seed in range(seeds)]

    def __call__(self, trial: optuna.Trial) -> float:
        start, values = time.perf_counter(), list[dict[str, Any]]()
        try:
            params = self._space.suggest(trial)
            earlier = _same(trial, params)
            if earlier is None:
                return self._mean(trial, params, values)
            trial.set_user_attr(REPEATS, earlier.number)
            values += earlier.user_attrs[VALUES]
            return fmean(one["value"] for one in values)
        except optuna.TrialPruned:
            raise
        except Exception as error:
            kind = "" if isinstance(error, LoraForgeError) else f"{type(error).__name__}: "
            trial.set_user_attr(ERROR, f"{kind}{' '.join(str(error).split())}")
            raise
        finally:
            trial.set_user_attr(VALUES, values)
            trial.set_user_attr(SECONDS, time.perf_counter() - start)

    def _mean(self, trial: optuna.Trial, params: Mapping[str, Any], values: list[dict[str, Any]]) -> float:
        settings = {**self._space.settings(params).for_session(), **self._metric.asks_for()}
        for prompt, seed in self._pairs:
            value = self._metric.read(self._run(prompt, seed=seed, **settings))
            values.append({"prompt": prompt, "seed": seed, "value": value})
            mean = fmean(one["value"] for one in values)
            trial.report(mean, len(values))
            if len(values) < len(self._pairs) and trial.should_prune():
                raise optuna.TrialPruned
        return mean


def _same(trial: optuna.Trial, params: Mapping[str, Any]) -> FrozenTrial | None:
    """A trial that was made of the same values."""
    complete = trial.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return next((one for one in complete if one.params == params), None)
