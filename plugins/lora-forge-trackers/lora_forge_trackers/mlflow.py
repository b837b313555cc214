"""MLflow: one run per run, where MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME say."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

__lora_forge_api__ = 1

from lora_forge_trackers.observer import hooks
from lora_forge_trackers.values import error_text, hyperparameters, step_values, summary, title

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from lora_forge.events import RunFailure, RunFinish, RunStart, StepFinish

# What one request to a server may hold, and how long a parameter and a tag may be.
METRICS_PER_BATCH = 1000
PARAMETERS_PER_BATCH = 100
LONGEST_PARAMETER = 6000
LONGEST_TAG = 5000
SECONDS_BETWEEN_BATCHES = 5.0


class MlflowLog:
    """A run of its own, addressed by its id: what else is active in the process plays no part."""

    def __init__(self, event: RunStart) -> None:
        # MLflow reports its use to its makers unless told not to; read when it is imported.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        self._metrics: list[Metric] = []
        self._sent = time.monotonic()
        self._client = MlflowClient()
        tags = {"lora_forge.run_id": event.run.id, "lora_forge.batch_id": event.run.batch_id}
        run = self._client.create_run(_experiment_id(self._client), tags=tags, run_name=title(event.run))
        self._id: str = run.info.run_id
        parameters = [
            Param(name, _cut(str(value), LONGEST_PARAMETER)) for name, value in hyperparameters(event).items()
        ]
        try:
            for first in range(0, len(parameters), PARAMETERS_PER_BATCH):
                self._client.log_batch(self._id, params=parameters[first : first + PARAMETERS_PER_BATCH])
        except BaseException:
            self._client.set_terminated(self._id, "KILLED")
            raise

    def step(self, event: StepFinish) -> None:
        self._add(step_values(event), event.step)
        if len(self._metrics) >= METRICS_PER_BATCH or time.monotonic() - self._sent >= SECONDS_BETWEEN_BATCHES:
            self._send()

    def finish(self, event: RunFinish) -> None:
        try:
            self._add(summary(event.result), event.run.iterations)
            self._send()
            self._log_file(event.result.path)
        finally:
            self._client.set_terminated(self._id, "FINISHED")

    def _log_file(self, path: object) -> None:
        """A file, a folder of PEFT's, or of what is at a URL the address."""
        if isinstance(path, Path):
            log = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
            log(self._id, str(path))
        elif path is not None:
            self._client.set_tag(self._id, "lora_forge.file", _cut(str(path), LONGEST_TAG))

    def fail(self, event: RunFailure) -> None:
        try:
            self._send()
            self._client.set_tag(self._id, "lora_forge.error", _cut(error_text(event.error), LONGEST_TAG))
        finally:
            failed = isinstance(event.error, Exception)  # and not Ctrl-C
            self._client.set_terminated(self._id, "FAILED" if failed else "KILLED")

    def _add(self, values: dict[str, float], step: int) -> None:
        now = int(1000 * time.time())
        self._metrics += [self._metric(name, value, now, step) for name, value in values.items()]

    def _send(self) -> None:
        while self._metrics:
            batch, self._metrics = self._metrics[:METRICS_PER_BATCH], self._metrics[METRICS_PER_BATCH:]
            self._client.log_batch(self._id, metrics=batch)
        self._sent = time.monotonic()


def _experiment_id(client: MlflowClient) -> str:
    """What MLflow's own variables say; else its default experiment."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME")
    if not name:
        return os.environ.get("MLFLOW_EXPERIMENT_ID") or "0"
    found = client.get_experiment_by_name(name)
    made: str = found.experiment_id if found else client.create_experiment(name)
    return made


def _cut(value: str, longest: int) -> str:
    return value if len(value) <= longest else value[: longest - 1] + "…"


lora_forge_run_started, lora_forge_step_finished, lora_forge_run_finished, lora_forge_run_failed = hooks(
    "mlflow", MlflowLog
)
