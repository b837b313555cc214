"""Print, as markdown, what starting up costs: of commands that help and list, and of a run up to its first step.

python benchmarks/startup.py commands --peers OTHER_ENVIRONMENT/bin
python benchmarks/startup.py first-step

`commands`: without plugins, with 20, and beside other command lines. The 20 plugins are installed by pip.
OTHER_ENVIRONMENT is one where `llm`, `tox` and `hatch` are installed; those that are not there are left out.

`first-step`: from the start of `lora-forge run` on tiny_sdxl to the end of its first step, against a process that
imports torch and the two CLIP classes and nothing else.

CPU time is user + system of the whole process. Commands take turns, so that what slows the machine for a while slows
them alike; figures are medians, and a ratio is the median of the rounds' own.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from fresh_environment import FreshEnvironment
from plugin_scenarios import well_made

PLUGINS = 20
PEERS = ("llm", "tox", "hatch")
CLIP_ALONE = "import torch\nfrom transformers import CLIPTextModel, CLIPTextModelWithProjection\n"
STAMP = """
import os, resource, time

def stamp():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    with open(os.environ["STAMP"], "w") as file:
        print(time.monotonic(), usage.ru_utime + usage.ru_stime, file=file)
"""
AT_A_STEP = """
from lora_forge import hookimpl

@hookimpl
def lora_forge_step_finished(event):
    stamp()
"""


class Cost(NamedTuple):
    """Seconds from a process's start to some moment of it."""

    wall: float
    cpu: float


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description="What starting up costs, as markdown.")
    parser.add_argument("what", choices=("commands", "first-step"))
    parser.add_argument("--peers", type=Path, metavar="BIN_FOLDER", help="where llm, tox and hatch are")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each command")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.what == "commands":
            _print_commands(_own(Path(folder)) | _peers(arguments.peers), arguments.rounds)
        else:
            _print_first_step(Path(folder), arguments.rounds)


def _print_commands(commands: dict[str, list[str]], rounds: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for command in commands.values():
        _whole(command)  # byte code and file caches are warm from here on
    for _ in range(rounds):
        for name, command in commands.items():
            seconds[name].append(_whole(command).cpu)
    print(f"| command | CPU time, median of {rounds} | least to most |")
    print("|---|---|---|")
    for name, times in seconds.items():
        print(f"| {name} | {statistics.median(times):.2f} s | {min(times):.2f} to {max(times):.2f} s |")


def _own(folder: Path) -> dict[str, list[str]]:
    commands = {}
    for count in (0, PLUGINS):
        place = folder / str(count)
        place.mkdir()
        environment = FreshEnvironment.make(place / "environment")
        if count:
            environment.install(*well_made(place, count))
        for verb in ("--help", "plugins list"):
            name = f"`lora-forge {verb}`, {count} plugins"
            commands[name] = [str(environment.python), "-m", "lora_forge", *verb.split()]
    return commands


def _peers(folder: Path | None) -> dict[str, list[str]]:
    found = [name for name in PEERS if folder and (folder / name).is_file()]
    return {f"`{name} --help`": [str(folder / name), "--help"] for name in found if folder}


def _print_first_step(folder: Path, rounds: int) -> None:
    clip, plugin, lora = folder / "clip.py", folder / "at_a_step.py", folder / "owl.safetensors"
    clip.write_text(f"{CLIP_ALONE}{STAMP}stamp()\n", encoding="utf-8")
    plugin.write_text(STAMP + AT_A_STEP, encoding="utf-8")
    run = ["run", "--prompt", "owl", "--model", "tiny_sdxl", "--iterations", "1", "--overwrite"]
    reference = [sys.executable, str(clip)]
    command = [sys.executable, "-m", "lora_forge", *run, "--plugin", str(plugin), "--output", str(lora)]
    columns: dict[str, list[Cost]] = {"torch and the CLIP classes": [], "first step": [], "whole command": []}
    for taken in range(rounds + 1):
        costs = _to_the_stamp(reference, folder)[0], *_to_the_stamp(command, folder)
        if taken:  # the first one warms byte code, file caches, and what is kept between runs
            for column, cost in zip(columns.values(), costs, strict=True):
                column.append(cost)
    print(f"| until | wall, median of {rounds} | CPU | wall, as a ratio | CPU, as a ratio |")
    print("|---|---|---|---|---|")
    base = columns["torch and the CLIP classes"]
    for name, column in columns.items():
        wall, cpu = (statistics.median(cost[i] for cost in column) for i in range(2))
        ratios = [[own[i] / other[i] for own, other in zip(column, base, strict=True)] for i in range(2)]
        spread = " | ".join(f"{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})" for r in ratios)
        print(f"| {name} | {wall:.2f} s | {cpu:.2f} s | {spread} |")


def _to_the_stamp(command: list[str], folder: Path) -> tuple[Cost, Cost]:
    """What a command costs until it stamps, and all of it."""
    file = folder / "stamp"
    started = time.monotonic()
    whole = _whole(command, STAMP=str(file))
    moment, cpu = map(float, file.read_text(encoding="utf-8").split())
    return Cost(moment - started, cpu), whole


def _whole(command: list[str], **variables: str) -> Cost:
    """The time of a command, and user and system time, its own children included."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    environment = {**os.environ, **variables}
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True, env=environment)
    wall, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Cost(wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)


if __name__ == "__main__":
    main()
