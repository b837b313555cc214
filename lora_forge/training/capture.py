"""A step's work as one CUDA graph: thousands of small launches become one, and the host has nothing to wait for.

Source: PyTorch's CUDA graphs (`torch.cuda.graph`), whole-network capture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from lora_forge.errors import RunFailed

T = TypeVar("T")
Replay = Callable[[], None]
Capture = Callable[[Callable[[], T]], tuple[Replay, T]]  # a function to what repeats it, and what that refills

WARM_UP = 3  # calls before the capture: libraries choose their algorithms, and tensors that stay come to be


class Captured(Generic[T]):
    """A function of no arguments that does the same on the same tensors at every call, and refills those it gives.

    capture: None calls the function every time. note: told, in words, when it cannot be captured; then too.
    """

    def __init__(self, function: Callable[[], T], capture: Capture[T] | None, note: Callable[[str], None]) -> None:
        self._function, self._capture, self._note = function, capture, note
        self._calls = 0
        self._replay: Replay | None = None
        self._result: T

    def __call__(self) -> T:
        """Do it once more; what it gives is valid until the next call."""
        if self._replay is None and self._capture is not None and self._calls >= WARM_UP:
            self._try(self._capture)
        if self._replay is None:
            self._calls += 1
            return self._function()
        self._replay()
        return self._result

    def _try(self, capture: Capture[T]) -> None:
        try:
            self._replay, self._result = capture(self._function)
        except (RuntimeError, RunFailed) as error:  # CUDA's, of whatever in the step cannot be captured
            self._capture = None
            self._note(f"steps run one operation at a time: {str(error).strip().splitlines()[0]}")


def cuda_capture(device: str, function: Callable[[], T]) -> tuple[Replay, T]:
    """Record the function's work on a CUDA device; nothing is computed until the first replay."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # the leaves' gradients are to be gathered on no other stream than the capture's
            function()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: another may be saving what came before.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = function()
    return graph.replay, result
