"""TensorBoard: one folder of event files per run id."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

__lora_forge_api__ = 1

from lora_forge_trackers.observer import hooks
from lora_forge_trackers.values import error_text, hyperparameters, step_values, summary, text

if TYPE_CHECKING:
    from lora_forge.events import RunFailure, RunFinish, RunStart, StepFinish


class TensorBoardLog:
    """Scalars per step and at the end, texts, and a session of the HPARAMS tab that succeeds or fails."""

    def __init__(self, event: RunStart) -> None:
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from torch.utils.tensorboard import SummaryWriter

        folder = os.environ.get("LORA_FORGE_TENSORBOARD_DIR") or "runs"
        # The same run again in the same folder takes the place of the earlier one: purge_step hides its steps.
        self._writer = SummaryWriter(os.path.join(folder, event.run.id), purge_step=0, flush_secs=10)
        self._writer.add_text("prompt", text(event.run.prompt))
        self._writer.file_writer.add_summary(hparams_pb(hyperparameters(event), trial_id=event.run.id))

    def step(self, event: StepFinish) -> None:
        for name, value in step_values(event).items():
            self._writer.add_scalar(name, value, event.step)

    def finish(self, event: RunFinish) -> None:
        with self._writer:
            for name, value in summary(event.result).items():
                self._writer.add_scalar(name, value, event.run.iterations)
            if event.result.path:
                self._writer.add_text("file", text(str(event.result.path.absolute())))
            self._end_session("STATUS_SUCCESS")

    def fail(self, event: RunFailure) -> None:
        with self._writer:
            self._writer.add_text("error", error_text(event.error))
            self._end_session("STATUS_FAILURE")

    def _end_session(self, status: str) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams import metadata
        from tensorboard.plugins.hparams.api_pb2 import Status
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo

        end = HParamsPluginData(session_end_info=SessionEndInfo(status=Status.Value(status), end_time_secs=time.time()))
        about = metadata.create_summary_metadata(end)
        value = Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=about, tensor=metadata.NULL_TENSOR)
        self._writer.file_writer.add_summary(Summary(value=[value]))


lora_forge_run_started, lora_forge_step_finished, lora_forge_run_finished, lora_forge_run_failed = hooks(
    "tensorboard", TensorBoardLog
)
