"""Weights & Biases: one run per run, offline unless WANDB_MODE says otherwise."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

__lora_forge_api__ = 1

from lora_forge_trackers.observer import hooks
from lora_forge_trackers.values import error_text, hyperparameters, step_values, summary, title

if TYPE_CHECKING:
    from lora_forge.events import RunFailure, RunFinish, RunStart, StepFinish


class WandbLog:
    """A run of its own beside whatever runs the process has: `wandb.run` stays as it was."""

    def __init__(self, event: RunStart) -> None:
        # Even offline, W&B reports its own errors and use to its makers unless told not to; read at its import.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        # Given here they would win over W&B's variables, so that each is given only where its variable is not set.
        defaults = {
            "WANDB_MODE": ("mode", "offline"),
            "WANDB_PROJECT": ("project", "lora-forge"),
            "WANDB_NAME": ("run_name", title(event.run)),
            "WANDB_RUN_GROUP": ("run_group", event.run.batch_id),
            "WANDB_CONSOLE": ("console", "off"),
            "WANDB_SILENT": ("silent", True),
        }
        chosen = {name: value for variable, (name, value) in defaults.items() if not os.environ.get(variable)}
        settings = wandb.Settings(reinit="create_new", **chosen)
        self._run = wandb.init(config=hyperparameters(event), settings=settings)

    def step(self, event: StepFinish) -> None:
        self._run.log(step_values(event), step=event.step)

    def finish(self, event: RunFinish) -> None:
        try:
            self._run.summary.update(summary(event.result))
            if event.result.path:
                self._log_file(event)
        finally:
            self._run.finish()

    def fail(self, event: RunFailure) -> None:
        try:
            self._run.summary.update({"error": error_text(event.error)})
        finally:
            self._run.finish(exit_code=1)

    def _log_file(self, event: RunFinish) -> None:
        from wandb import Artifact

        artifact = Artifact(f"lora-{event.run.id}", type="lora")
        path = event.result.path
        if isinstance(path, Path):
            # By reference to where it is: neither the staging area nor the cache gets a copy.
            add = artifact.add_dir if path.is_dir() else artifact.add_file
            add(str(path), policy="immutable", skip_cache=True)
        else:
            artifact.add_reference(str(path), name=path.name, checksum=False)
        self._run.log_artifact(artifact)


lora_forge_run_started, lora_forge_step_finished, lora_forge_run_finished, lora_forge_run_failed = hooks(
    "wandb", WandbLog
)
