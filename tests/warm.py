"""Processes that start in a moment: forked from one that has imported the heavy libraries already, and nothing else.

What runs in one is what would run in a process of its own: lora-forge and every plugin are imported anew, with the
arguments, folder, environment and streams of whoever asked. Only torch, transformers, diffusers and peft are there
before; so tests of what is imported, and of how long that takes, start processes the usual way.

    subprocess.run([*warm_python(python, site), "-m", "lora_forge", "plugins", "list"])
"""

from __future__ import annotations

import atexit
import functools
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent


def warm_python(python: Path, site: Path) -> list[str]:
    """What to write in place of an environment's `python`; its arguments may be `-m`, `-c` or `-`, and those after it.

    site: the environment's own site-packages.
    """
    return [sys.executable, "-IS", str(HERE / "warm_client.py"), str(_server()), str(python), str(site)]


@functools.cache
def _server() -> Path:
    """The socket of a server that ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    address = folder / "socket"
    process = subprocess.Popen([sys.executable, str(HERE / "warm_server.py"), str(address)], stdin=subprocess.PIPE)

    def end() -> None:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(end)
    deadline = time.monotonic() + 300
    while not address.exists():
        assert process.poll() is None, "the server did not start"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return address
