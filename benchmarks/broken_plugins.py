"""Print, as markdown, what each command does beside a plugin that is broken, slow or in conflict.

python benchmarks/broken_plugins.py

Every distribution is installed by pip into an environment of its own; commands with the same outcome
share a row. Takes some minutes.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from plugin_scenarios import COMMANDS, LIST, LIST_JSON, REFERENCE, RUN, Outcome, Scenario, scenarios

SLEEP = 5.0  # seconds that the slow one takes to import


def main() -> None:
    """Carry out every command beside every plugin and print a table."""
    reference = _outcomes(REFERENCE)
    print("| plugin | commands | exit code | what it says on stderr | the rest |")
    print("|---|---|---|---|---|")
    for scenario in scenarios(SLEEP):
        outcomes = _outcomes(scenario)
        groups: dict[tuple[int, str, str], list[str]] = {}
        for command, outcome in outcomes.items():
            said = _said(outcome, reference[command] if command in COMMANDS else None)
            row = (outcome.code, said, _rest(scenario, command, outcome, reference))
            groups.setdefault(row, []).append(command)
        for (code, said, rest), commands in groups.items():
            print(f"| {scenario.title} | {', '.join(map(_code, map(_short, commands)))} | {code} | {said} | {rest} |")
        sys.stdout.flush()


def _outcomes(scenario: Scenario) -> dict[str, Outcome]:
    with tempfile.TemporaryDirectory() as folder:
        return scenario.carry_out(Path(folder))


def _said(outcome: Outcome, without: Outcome | None) -> str:
    """The lines on stderr that are not there without the plugin (progress and warnings are)."""
    known = without.stderr.splitlines() if without else []
    lines = [line for line in outcome.stderr.splitlines() if line not in known and not line.startswith("step ")]
    return "<br>".join(_code(line.strip()) for line in lines) or "nothing"


def _rest(scenario: Scenario, command: str, outcome: Outcome, reference: dict[str, Outcome]) -> str:
    """What else differs from the same command without the plugin."""
    if outcome.raised:
        return f"{_code(outcome.raised)} came out of it"
    if command == RUN:
        same = outcome.file == reference[RUN].file
        return "the file is the same, to the byte" if same else "the file differs"
    if command == LIST:
        lines = [" ".join(line.split()) for line in outcome.stdout.splitlines()]
        mine = (line for line in lines if any(name in line for name in scenario.distributions))
        return "<br>".join(_code(line) for line in mine)
    if command == LIST_JSON:
        rows, before = (json.loads(text)["plugins"] for text in (outcome.stdout, reference[command].stdout))
        same = [row for row in rows if row["distribution"] not in scenario.distributions] == before
        return "the same rows, and the plugin" if same else "other rows"
    if command not in COMMANDS:
        return ""
    return "as without it" if outcome.stdout == reference[command].stdout else "differs on stdout"


def _short(command: str) -> str:
    return command.replace(" --prompt owl --model tiny_sdxl --date 2026-01-31", " …").replace(
        " --output dry.safetensors", ""
    )


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")


if __name__ == "__main__":
    main()
