"""lora-forge: a LoRA for one prompt, without images, in seconds.

Everything heavy is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lora_forge.comparison.results import Results as Results
    from lora_forge.comparison.results import read_results as read_results
    from lora_forge.hookspecs import hookimpl as hookimpl
    from lora_forge.records import BackendSpec as BackendSpec
    from lora_forge.records import ExecutorSpec as ExecutorSpec
    from lora_forge.records import FileLayout as FileLayout
    from lora_forge.records import InitializerSpec as InitializerSpec
    from lora_forge.records import LossSpec as LossSpec
    from lora_forge.records import OptimizerSpec as OptimizerSpec
    from lora_forge.records import SaverSpec as SaverSpec
    from lora_forge.result import RunResult as RunResult
    from lora_forge.session import Session as Session
    from lora_forge.session import compare as compare
    from lora_forge.session import load as load
    from lora_forge.session import run as run

_HOMES = {
    "hookimpl": "hookspecs",
    "InitializerSpec": "records",
    "LossSpec": "records",
    "OptimizerSpec": "records",
    "SaverSpec": "records",
    "BackendSpec": "records",
    "ExecutorSpec": "records",
    "FileLayout": "records",
    "RunResult": "result",
    "Session": "session",
    "Results": "comparison.results",
    "read_results": "comparison.results",
    "compare": "session",
    "load": "session",
    "run": "session",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lora_forge' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lora_forge.{_HOMES[name]}"), name)
