"""A run config as people keep it: a TOML file, and a command line of `lora-forge run`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

_OPTIONS = {"plugins": "plugin"}  # where the command line's word is not the key's


def as_toml(config: Mapping[str, Any]) -> str:
    """One key a line; tables within a line."""
    return "".join(f"{_key(key)} = {_toml(value)}\n" for key, value in config.items() if value is not None)


def as_command(config: Mapping[str, Any], prompt: str) -> str:
    """For a POSIX shell."""
    words = ["lora-forge", "run", "--prompt", prompt]
    for key, value in config.items():
        words += _words(key, value)
    return shlex.join(words)


def _key(text: str) -> str:
    bare = text.replace("_", "").replace("-", "").isalnum() and text.isascii()
    return text if bare else json.dumps(text)


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)} = {_toml(one)}" for key, one in value.items() if one is not None) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _words(key: str, value: Any) -> Iterator[str]:
    option = "--" + _OPTIONS.get(key, key).replace("_", "-")
    if key == "backend_options":
        yield from (word for name, one in value.items() for word in ("--backend-opt", f"{name}={_text(one)}"))
    elif key == "sidecar":
        yield "--sidecar" if value else "--no-sidecar"
    elif isinstance(value, bool):
        yield from [option] * value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _plugin(key, one) if isinstance(one, Mapping) else (option, _text(one))
    elif isinstance(value, Mapping):
        yield from _plugin(key, value)
    elif value is not None:
        yield from (option, _text(value))


def _plugin(kind: str, table: Mapping[str, Any]) -> Iterator[str]:
    name = table.get("name", "")
    weight = f":{table['weight']}" if "weight" in table else ""
    schedule = f"@{table['schedule']}" if "schedule" in table else ""
    if name:
        yield from (f"--{kind}", f"{name}{weight}{schedule}")
    owner = f"{name}." if kind in ("loss", "measure", "saver") else ""
    for key, value in table.get("options", {}).items():
        yield from (f"--{kind}-opt", f"{owner}{key}={_text(value)}")


def _text(value: Any) -> str:
    """As the command line has it, where text needs no quotes."""
    if isinstance(value, str):
        return value
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
