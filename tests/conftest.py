"""Fixtures shared by all tests: one cache with the tiny models, and no way to the Hub."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_forge.builtin.sd15.family import SD15
from lora_forge.builtin.sdxl.family import SDXL
from lora_forge.clip_unet import tiny
from lora_forge.clip_unet.family import Family

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Workers share the cores between them; more threads than cores would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that starts the tests in the background has them ignore SIGINT, and so would every process they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

FAMILIES: dict[str, Family] = {"tiny_sdxl": SDXL, "tiny_sd15": SD15}
CHECKOUT = Path(__file__).parent.parent
APART = ("test_docs.py", "test_docs_site.py", "test_first_party_plugins.py")  # files of long tests that share little


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`, a file's tests stay together, so that what they share is made once; those of a few files do not."""
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return nodeid if Path(file).name in APART else file

    config.option.loadscopereorder = False
    return Scheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `exhaustive` run only where they are asked for by that word, or by their name."""
    asked = "exhaustive" in config.option.markexpr or any("::" in argument for argument in config.args)
    left_out = [] if asked else [item for item in items if item.get_closest_marker("exhaustive")]
    if left_out:
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache that tiny_sdxl is made in, once for all workers (or the one the environment names)."""
    if "LORA_FORGE_CACHE" not in os.environ:
        base = tmp_path_factory.getbasetemp()
        shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
        os.environ["LORA_FORGE_CACHE"] = str(shared / "lora-forge-cache")
    return Path(os.environ["LORA_FORGE_CACHE"])


@pytest.fixture(scope="session", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> str:
    """The tiny model of each family in turn: what asks for it is held to both."""
    return str(request.param)


@pytest.fixture(scope="session")
def family(model: str) -> Family:
    """What `model` is a model of."""
    return FAMILIES[model]


@pytest.fixture(scope="session")
def model_folder(family: Family, cache_folder: Path) -> Path:
    """`model` as a diffusers folder."""
    return tiny.tiny_folder(family)


@pytest.fixture(scope="session")
def tiny_folder(cache_folder: Path) -> Path:
    """tiny_sdxl as a diffusers folder."""
    return tiny.tiny_folder(SDXL)


@pytest.fixture(scope="session")
def cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `lora-forge` in a process of its own, as a user would."""

    def run(*arguments: str | Path, **settings: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lora_forge", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, **settings)

    return run


@pytest.fixture
def bucket() -> Iterator[Any]:
    """fsspec's file system in memory, which stands for any that is not on this machine; empty before and after."""
    import fsspec

    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]
