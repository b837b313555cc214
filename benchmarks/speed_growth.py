"""How time and memory grow with the number of prompts in one bank: one size, in this process.

python benchmarks/speed_growth.py --model NAME --model-folder DIR --prompts 4 [--iterations 3] [--dtype bfloat16]

Prints one JSON object: seconds per step, peak memory, and the bytes that are expected of it: the bank (parameter,
gradient and AdamW's two moments, float32), what autograd saves in a step, and the results. Saved activations are
counted in a second, shorter run, by `torch.autograd.graph.saved_tensors_hooks`: every storage once, without weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from lora_forge.clock import Clock
from lora_forge.config.run import read_run_config
from lora_forge.model import open_model
from lora_forge.plan import Request, make_plan
from lora_forge.plugins import discover
from lora_forge.result import RunResult
from lora_forge.runner import forge

FLOAT = 4  # bytes of a float32


class SavedBytes:
    """Hooks that count what autograd saves; `total` is in bytes, of distinct storages that are no parameter's."""

    def __init__(self) -> None:
        self._seen: dict[int, torch.UntypedStorage] = {}
        self._weights: set[int] = set()

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self._weights:  # by now the model is loaded and the bank is made
            parameters = [thing for thing in gc.get_objects() if type(thing) is torch.nn.Parameter]
            self._weights = {p.untyped_storage().data_ptr() for p in parameters if p.layout == torch.strided}
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._weights:
                self._seen[storage.data_ptr()] = storage  # kept alive, so that no other takes its address
        return tensor

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self._seen.values())


def peak_bytes() -> int:
    """The most memory this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Measure one size and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="sdxl_base", help="model config")
    parser.add_argument("--model-folder", required=True)
    parser.add_argument("--prompts", type=int, required=True)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    prompts = [f"a painting of {number} steampunk owls" for number in range(1, given.prompts + 1)]

    clock = Clock()
    results = run(prompts, given, given.iterations, clock)
    peak = peak_bytes()
    numbers = sum(
        t.numel() for layers in results[0].weights.values() for pair in layers.values() for t in pair.values()
    )
    del results

    saved = SavedBytes()
    with saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        run(prompts, given, 1, Clock())
    report = {
        "prompts": given.prompts,
        "dtype": given.dtype,
        "seconds": clock.seconds,
        "seconds_per_step": clock.seconds["steps"] / given.iterations,
        "peak_bytes": peak,
        "bank_bytes": 4 * FLOAT * numbers * given.prompts,
        "result_bytes": FLOAT * numbers * given.prompts,
        "saved_bytes": saved.total,
    }
    print(json.dumps(report))


def run(prompts: Sequence[str], given: Any, iterations: int, clock: Clock) -> list[RunResult]:
    """All prompts in one bank; no file is written."""
    settings = {
        "prompt": prompts[0],
        "model": given.model,
        "base_model": given.model_folder,
        "dtype": given.dtype,
        "iterations": iterations,
        "device": given.device,
    }
    registry = discover()
    plan = make_plan(read_run_config([settings]), registry)
    requests = [Request(prompt, None, 0, None) for prompt in prompts]
    return forge(plan, requests, open_model(plan), registry, clock)


if __name__ == "__main__":
    main()
