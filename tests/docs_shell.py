"""Follows a page to the letter: its commands in a real shell, in a fresh environment, with pip and pytest for real."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterable
from pathlib import Path

from docs_pages import Block
from fresh_environment import FreshEnvironment

_PROGRAMS = {"lora-forge": "lora_forge", "pip": "pip", "pytest": "pytest"}
# pip finds on this machine what it would download; "0" is how it is told not to isolate builds.
_OFFLINE = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


class Shell:
    """A reader's terminal in `folder`, with `environment` activated."""

    def __init__(self, environment: FreshEnvironment, folder: Path) -> None:
        self.environment, self.folder = environment, folder
        self._bin = environment.python.parent
        for program, module in _PROGRAMS.items():
            python = [str(environment.python)] if program == "pip" else environment.warm
            script = self._bin / program
            script.write_text(f'#!/bin/sh\nexec {shlex.join(python)} -m {module} "$@"\n', encoding="utf-8")
            script.chmod(0o755)

    def follow(self, blocks: Iterable[Block]) -> None:
        """Write the files that blocks are, and run the others, in the order they stand in."""
        for block in blocks:
            if block.sets_up:  # the environment is what these lines make
                continue
            if block.file_name:
                path = self.folder / block.file_name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text, encoding="utf-8")
            elif block.language == "bash":
                self.run(block.text, str(block))
            elif block.language == "python":
                self.run(f"{shlex.join(self.environment.warm)} - <<'END'\n{block.text}END\n", str(block))

    def run(self, script: str, where: str = "") -> str:
        """Run the lines of a script and stay in the folder it ends in; returns what it printed."""
        kept = self._bin / "folder"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f'{script}\npwd > "{kept}"'],
            cwd=self.folder,
            env=self._variables(),
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, f"{where}\n{script}\n{done.stdout}\n{done.stderr}"
        self.folder = Path(kept.read_text(encoding="utf-8").strip())
        return done.stdout

    def _variables(self) -> dict[str, str]:
        kept = {
            key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "PYTHON", "LORA_FORGE_P"))
        }
        return {**kept, **_OFFLINE, "PATH": f"{self._bin}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "200"}
