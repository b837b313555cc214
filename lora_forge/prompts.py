"""Options that hold prompts: one, a list, or a file with a prompt a line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_forge.options import Text, Unfit


def prompts_field(*, default: Sequence[str] | None = None, help: str) -> Any:
    """A field `tuple[str, ...]` of an options type that holds prompts; without a default it is required.

    Given as text it is one prompt, commas and all; `@FILE` is a prompt a line of that file, and what starts with `[`
    a JSON list. In a prompt `{prompt}` stands for that of the run, once `Batch.encode` gets it.
    """
    metadata = {"help": help, "read": read_prompts}
    if default is None:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=tuple(default), metadata=metadata)


def read_prompts(value: Any) -> tuple[str, ...]:
    """Prompts as given for an option. Raises Unfit, in words."""
    if isinstance(value, str) and value.startswith("@"):
        return read_prompt_file(Path(value[1:]))
    if isinstance(value, Text) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            pass  # a prompt may start like that
    if isinstance(value, str):
        return (str(value),)
    if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
        raise Unfit(f"expected a prompt, a list of prompts, or @FILE, got {value!r}")
    if not value:
        raise Unfit("expected at least one prompt")
    return tuple(str(one) for one in value)


def read_prompt_file(path: Path) -> tuple[str, ...]:
    """The prompts of a file, one a line, each once; blank lines are none. Raises Unfit for one without any."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise Unfit(f"{str(path)!r} cannot be read: {reason}") from error
    lines = tuple(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if not lines:
        raise Unfit(f"{str(path)!r} holds no prompt")
    return lines
