"""A file of prompts that an option names."""

from __future__ import annotations

from pathlib import Path

from lora_forge.errors import UsageError
from lora_forge.options import Unfit
from lora_forge.prompts import read_prompt_file


def prompt_file(option: str, path: Path) -> tuple[str, ...]:
    """Its prompts, one a line, each once. Raises UsageError that names the option of the command line."""
    try:
        return read_prompt_file(path)
    except Unfit as error:
        raise UsageError(f"{option} {error}") from error
