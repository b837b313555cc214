"""A plugin file that notes what became of each prompt of a batch: seconds by phase, losses, file.

One JSON line each, appended to the file that the environment variable LORA_FORGE_SPEED_LOG names. Observers hear of
a run when it is over, so the step loop does not pay for it.
"""

from __future__ import annotations

import json
import os

from lora_forge import hookimpl
from lora_forge.events import RunFinish


@hookimpl
def lora_forge_run_finished(event: RunFinish) -> None:
    result = event.result
    losses = [*(values.loss for values in result.steps), result.loss_after]
    line = {"prompt": event.run.prompt, "path": str(result.path), "seconds": dict(result.seconds), "losses": losses}
    with open(os.environ["LORA_FORGE_SPEED_LOG"], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
