"""The server of `warm.py`: imports the heavy libraries, and forks a process for everyone who asks."""

from __future__ import annotations

import atexit
import importlib
import io
import json
import os
import runpy
import signal
import site
import socket
import sys
import threading
import traceback
import types
from typing import Any

HEAVY = (
    *("torch", "numpy", "safetensors.torch", "diffusers", "peft", "rich.console", "rich.progress", "rich.table"),
    *("transformers.models.clip.modeling_clip", "transformers.models.clip.tokenization_clip"),
    *("diffusers.models.unets.unet_2d_condition", "diffusers.models.autoencoders.autoencoder_kl"),
    *("diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl", "_pytest.config"),
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
)


def serve(address: str) -> None:
    sys.path.pop(0)  # the folder of this file
    for name in HEAVY:
        importlib.import_module(name)
    assert not [name for name in sys.modules if name.partition(".")[0] == "lora_forge"]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them here
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address + ".made")
        listening.listen()
        os.rename(address + ".made", address)
        while True:
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                _carry_out(connection)
            connection.close()


def _carry_out(connection: socket.socket) -> None:
    length, descriptors, _, _ = socket.recv_fds(connection, 8, 3)
    request = b""
    while len(request) < int.from_bytes(length, "little"):
        request += connection.recv(2**16)
    code = 1
    try:
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        _become(json.loads(request))
        code = _exit_code(json.loads(request)["arguments"])
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        connection.sendall(bytes([code & 255]))
        os._exit(code)


def _become(told: dict[str, Any]) -> None:
    """What a fresh interpreter of that environment would be."""
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(told["folder"])
    os.environ.clear()
    os.environ.update(told["env"])
    sys.executable, sys.dont_write_bytecode = told["python"], bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), encoding="utf-8")
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding="utf-8")
    sys.stderr = io.TextIOWrapper(
        io.FileIO(2, "w", closefd=False), encoding="utf-8", errors="backslashreplace", line_buffering=True
    )
    around = [index for index, path in enumerate(sys.path) if path.endswith("site-packages")]
    sys.path.insert(around[0], told["site"])
    site.addsitedir(told["site"])
    named = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:0] = [os.getcwd() if told["arguments"][0] == "-m" else "", *named]
    importlib.invalidate_caches()


def _exit_code(arguments: list[str]) -> int:
    how, *rest = arguments
    try:
        if how == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            code, sys.argv = (rest[0], ["-c", *rest[1:]]) if how == "-c" else (sys.stdin.read(), ["-", *rest])
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(code, "<string>", "exec"), main.__dict__)
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    serve(sys.argv[1])
