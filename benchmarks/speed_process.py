"""A command run in a process of its own and measured, and the machine it ran on. Nothing heavy is imported.

The peak memory that Linux reports of a child is at least what the parent held when it started it, so the
process that measures has to stay small.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

_KIB = 1 if sys.platform == "darwin" else 1024  # macOS counts ru_maxrss in bytes
_PACKAGES = ("torch", "transformers", "diffusers", "peft", "safetensors", "numpy", "lora-forge")
_FLAGS = ("avx", "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_bf16", "asimd")


@dataclass(frozen=True)
class Measured:
    """One process, from its start to its end.

    wall, cpu: seconds; cpu is user + system, of its own children too. peak: most resident memory at once, bytes,
    mapped files included. code: the exit code, negative for a signal.
    """

    wall: float
    cpu: float
    peak: int
    code: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str | None:
        """Why it failed, in one line; None if it did not."""
        if self.code == 0:
            return None
        if self.code < 0:
            return f"killed by signal {-self.code}" + (": out of memory?" if self.code == -signal.SIGKILL else "")
        lines = [line for line in self.stderr.splitlines() if line.strip()]
        return f"exit code {self.code}: {lines[-1].strip() if lines else 'it says nothing'}"


def measure(command: Sequence[str], threads: int | None = None, variables: Mapping[str, str] | None = None) -> Measured:
    """Run a command to its end.

    threads: for its matrix products; None leaves that to it. variables: added to its environment.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **(variables or {})}
    if threads:
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        texts = []
        for stream in (stdout, stderr):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
    cpu = usage.ru_utime + usage.ru_stime
    return Measured(wall, cpu, usage.ru_maxrss * _KIB, process.returncode, texts[0], texts[1])


def read_through(folder: Path) -> None:
    """Read every file of a folder, so that each side finds them in the page cache, as far as memory allows."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb", buffering=0) as file:
            while file.read(2**24):
                pass


def machine(threads: int | None) -> dict[str, Any]:
    """The machine and the versions of what runs on it, ready for JSON."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "cores": cores,
        "flags": [flag for flag in _FLAGS if flag in flags],
        "threads": threads or "as the process chooses",
        "load_before": os.getloadavg()[0],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
