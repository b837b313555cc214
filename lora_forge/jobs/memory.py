"""What a prompt takes of memory in a batch, how much there is, and whether it ran out."""

from __future__ import annotations

import gc
from pathlib import Path

import psutil
import torch

from lora_forge.clock import Clock
from lora_forge.model import LoadedModel
from lora_forge.plan import Plan, Request
from lora_forge.training.train import set_up_empty

_BANK_COPIES = 4  # the numbers, their gradient, and the two moments of the usual optimizers
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current"))


def bytes_per_prompt(plan: Plan, request: Request, model: LoadedModel) -> int:
    """What one more prompt adds to a batch, in bytes: its share of the bank, and the activations kept for backward.

    Measured by a forward pass of one prompt and one of two, so that what all prompts share falls out.
    """
    with model.use(plan, Clock()):
        one, two = (_saved_bytes(plan, [request] * prompts, model) for prompts in (1, 2))
    return two - one


def _saved_bytes(plan: Plan, requests: list[Request], model: LoadedModel) -> int:
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    bank, view, objective = set_up_empty(plan, requests, model)
    model.slot.bank = bank
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        values = objective.values()  # held, as what it saved is, so that no two tensors can have had one place
    own = bank.parameter.untyped_storage()
    saved.pop(own.data_ptr(), None)
    del values, view
    copies = _BANK_COPIES + (plan.config.keep == "best" or bool(plan.config.stop_when)) + plan.config.probe
    return copies * own.nbytes() + sum(saved.values())


def free_memory(device: str) -> int:
    """Bytes that can still be taken on a device; of the CPU's, within what this process's control group may have."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    try:
        most, used = (int(path.read_text()) for path in _LIMITS)
    except (OSError, ValueError):  # no such group, or "max"
        return free
    return min(free, most - used)


def out_of_memory(error: BaseException | None) -> bool:
    """Whether memory had run out, on the device or here; it may be the cause of what says so in our words."""
    while error is not None:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(error, RuntimeError) and "allocate memory" in str(error):  # PyTorch's, of the CPU's memory
            return True
        error = error.__cause__
    return False


def release_memory() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
