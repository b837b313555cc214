"""What the command line says when it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_forge.cli.main import main


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The error a command is refused with; nothing is printed beside it."""
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("lora-forge: error: ")
    return printed.err.removeprefix("lora-forge: error: ")
