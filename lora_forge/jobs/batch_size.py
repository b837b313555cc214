"""How many prompts train side by side, where nobody said it."""

from __future__ import annotations

from lora_forge.jobs.memory import bytes_per_prompt, free_memory
from lora_forge.model import LoadedModel
from lora_forge.plan import Plan, Request

# Beyond these a batch gains nothing: the matrices of the products are as tall as the processors like them.
MOST = {"cpu": 16, "cuda": 64}
_SHARE = 0.5  # of what is free: beside what is kept for backward there are the passing tensors of a layer, and saving


def batch_size_for(plan: Plan, request: Request, model: LoadedModel) -> int:
    """The largest power of two that the device's free memory holds, and that still gains something; 1 at least."""
    most = MOST.get(model.device.partition(":")[0], MOST["cpu"])
    room = int(free_memory(model.device) * _SHARE) // max(bytes_per_prompt(plan, request, model), 1)
    size = 1
    while size * 2 <= min(most, room):
        size *= 2
    return size
