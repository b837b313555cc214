"""Python's garbage collector, while a command that runs a model starts up."""

from __future__ import annotations

import gc
import sys
from types import TracebackType

from lora_forge.events import RunStart
from lora_forge.hookspecs import hookimpl


class StartUp:
    """Keeps the collector away from what is imported, from here to the first step, and for good.

    Importing torch and transformers makes half a million objects that stay. Looking through them again and again is
    a fifth of the time that they take to import, and as much again when the process ends. Where torch has been
    imported already, this does nothing.
    """

    def __init__(self) -> None:
        self._resting = gc.isenabled() and "torch" not in sys.modules

    def __enter__(self) -> StartUp:
        if self._resting:
            gc.disable()
        return self

    @hookimpl
    def lora_forge_run_started(self, event: RunStart) -> None:
        """All is imported."""
        self._end()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        if self._resting:
            gc.freeze()
            gc.enable()
            self._resting = False
