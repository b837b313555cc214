"""The cluster: joined or started, left as it was, and how many workers it has room for."""

from __future__ import annotations

import io
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

import ray

from lora_forge.errors import PluginError
from lora_forge_ray.options import Options

# Of a cluster of our own. What goes through it, settings, tasks and outcomes, is small; Ray would take a third of the
# machine's memory.
_OBJECT_STORE = 128 * 2**20
_ANSWER = 10.0  # seconds that a cluster's first machine has to accept a connection


@contextmanager
def cluster(options: Options, threads: int) -> Iterator[None]:
    """Within this the process is connected to the cluster. One that is started here ends here, and no other.

    Raises PluginError for a cluster that cannot be reached.
    """
    if ray.is_initialized():  # by the program around us, which knows which cluster it wants
        yield
        return
    with redirect_stdout(sys.stderr):  # Ray tells of workers that die on stdout, which may be somebody's JSON
        try:
            with _own_signals():
                _connect(options, threads)
            yield
        finally:
            with redirect_stdout(io.StringIO()):  # of actors that were killed on purpose there is nothing to tell
                ray.shutdown()


def resources(options: Options, threads: int) -> dict[str, float]:
    """What one worker takes of a machine; of processors, one beside a GPU, and otherwise its threads."""
    gpus = options.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
    if gpus > 1 and gpus % 1:
        raise PluginError(f"gpus_per_worker: several GPUs are whole ones, got {gpus:g}")
    return {"CPU": 1.0, "GPU": gpus} if gpus else {"CPU": float(threads)}


def room(need: Mapping[str, float]) -> int:
    """How many workers fit on the machines of the cluster, each whole on one."""
    return sum(_fit(node["Resources"], need) for node in ray.nodes() if node["Alive"])


def _fit(has: Mapping[str, float], need: Mapping[str, float]) -> int:
    counts = {name: has.get(name, 0) // amount for name, amount in need.items()}
    part = need.get("GPU", 1)
    if part < 1:  # a part of a GPU is of one: two workers of 0.6 do not share 1.2 of two
        counts["GPU"] = has.get("GPU", 0) * (1 // part)
    return int(min(counts.values()))


def _connect(options: Options, threads: int) -> None:
    if options.address:
        where, chosen = f"at {options.address!r} cannot be reached", {"address": options.address}
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        where, chosen = "cannot be started here", _new_cluster(options, threads)
    try:
        _reach(options.address)
        ray.init(log_to_driver=False, logging_level=logging.CRITICAL, **chosen)
    except Exception as error:
        raise PluginError(f"a Ray cluster {where}: {' '.join(str(error).split())[:300]}") from error


def _reach(address: str) -> None:
    """Raises OSError where nobody answers; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER).close()


def _new_cluster(options: Options, threads: int) -> dict[str, Any]:
    # As many processors as were asked for, if need be by taking turns on those that are there.
    processors = max(os.cpu_count() or 1, threads, options.workers * threads)
    return {
        "address": "local",
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE,
        "num_cpus": processors,
    }


@contextmanager
def _own_signals() -> Iterator[None]:
    """Afterwards signals are handled as before: Ray's own handlers would end the process past all tidying up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
