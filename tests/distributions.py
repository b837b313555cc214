"""Pretend installations: distributions with entry points, in a folder that is put on `sys.path`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent

import pytest

LOSS = """
from lora_forge import LossSpec, hookimpl

def small(batch):
    return sum(output.last_hidden_state.square().mean((1, 2)) for output in batch.adapted().values())

@hookimpl
def lora_forge_losses():
    yield LossSpec(name="{name}", summary="small embeddings", factory=small)
"""


class Site:
    """A folder on `sys.path`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, name: str, source: str, *, version: str = "1.0", entry: str = "plugin") -> str:
        """Install a distribution of one module with one entry point; returns the module's name."""
        module = f"{name.replace('-', '_')}_module"
        (self.folder / f"{module}.py").write_text(dedent(source))
        self.describe(name, f"[lora_forge]\n{entry} = {module}\n".encode(), version=version)
        return module

    def describe(self, name: str, entry_points: bytes, *, version: str = "1.0", metadata: bool = True) -> None:
        """Write a distribution's metadata alone."""
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        if metadata:
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_bytes(entry_points)
        importlib.invalidate_caches()


@contextmanager
def pretend_site(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A `Site`; its modules are forgotten afterwards, like those of plugin files."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(folder))
    yield Site(folder)
    for name in set(sys.modules) - before:
        if name.endswith("_module") or name.startswith("lora_forge_file_"):
            del sys.modules[name]


def write_plugin(path: Path, source: str) -> Path:
    """A plugin file."""
    path.write_text(dedent(source))
    return path
