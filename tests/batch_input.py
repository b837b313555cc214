"""Files of prompts, written in the current folder and read as a job reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_forge.jobs.rows import Input, Row, read_rows


def read(name: str, content: str | bytes, **settings: Any) -> Input:
    """What is read of a file of this name, in the current folder."""
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    return read_rows(name, **settings)


def row(content: str, name: str = "rows.csv") -> Row:
    """The only row of a file."""
    (only,) = read(name, content).rows
    return only


def line(**given: Any) -> Row:
    """A prompt and what else it is given, as a line of JSON."""
    return row(json.dumps({"prompt": "an owl", **given}), "rows.jsonl")
