"""Finding a reward function: in a file, or in a module that is installed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lora_forge.errors import PluginError

RewardFunction = Callable[[torch.Tensor, Sequence[str]], torch.Tensor]
"""Called with pictures `(n, 3, height, width)` in [0, 1] and n prompts; gives `(n,)`, larger is better."""


def find_function(reference: Path) -> RewardFunction:
    """What `file.py:name` or `package.module:name` names; a class is made without arguments. Raises PluginError."""
    place, colon, name = str(reference).rpartition(":")
    if not colon or not name.isidentifier():
        raise PluginError(f"reward {str(reference)!r} is no file.py:name and no package.module:name")
    found = getattr(_module(place), name, None)
    if not callable(found):
        raise PluginError(f"reward {str(reference)!r}: {place} has no function {name!r}")
    return _made(found, str(reference))


@functools.lru_cache(maxsize=8)  # a reward model is loaded once, and not for each batch of a job
def _made(found: Any, reference: str) -> RewardFunction:
    if not isinstance(found, type):
        return found  # type: ignore[no-any-return]
    try:
        made: RewardFunction = found()
    except Exception as error:
        reason = " ".join(str(error).split())
        raise PluginError(f"reward {reference!r} cannot be made: {type(error).__name__}: {reason}") from error
    return made


def _module(place: str) -> Any:
    try:
        if place.endswith(".py"):
            path = Path(place).expanduser().resolve()
            return _file(path, path.stat().st_mtime_ns)
        return importlib.import_module(place)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise PluginError(f"reward {place!r} cannot be imported: {type(error).__name__}: {reason}") from error


@functools.lru_cache(maxsize=8)
def _file(path: Path, changed: int) -> Any:
    spec = importlib.util.spec_from_file_location(f"lora_forge_reward_file_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
