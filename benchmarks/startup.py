"""Print, as markdown, the CPU time of starting up: without plugins, with 20, and beside other command lines.

python benchmarks/startup.py --peers OTHER_ENVIRONMENT/bin

CPU time is user + system of the whole process, the median of several runs, the commands taking turns so
that what slows the machine for a while slows them alike. The 20 plugins are installed by pip. OTHER_ENVIRONMENT
is one where `llm`, `tox` and `hatch` are installed; those that are not there are left out.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from fresh_environment import FreshEnvironment
from plugin_scenarios import well_made

PLUGINS = 20
PEERS = ("llm", "tox", "hatch")


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description="CPU time of starting up, as markdown.")
    parser.add_argument("--peers", type=Path, metavar="BIN_FOLDER", help="where llm, tox and hatch are")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each command")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        commands = _own(Path(folder)) | _peers(arguments.peers)
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for command in commands.values():
            _cpu_seconds(command)  # byte code and file caches are warm from here on
        for _ in range(arguments.rounds):
            for name, command in commands.items():
                seconds[name].append(_cpu_seconds(command))
    print(f"| command | CPU time, median of {arguments.rounds} | least to most |")
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


def _cpu_seconds(command: list[str]) -> float:
    """User and system time of a command, its own children included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


if __name__ == "__main__":
    main()
