"""Keys of settings, `rank`, `optimizer.lr`, `loss.embed_direction.scale`, `weight.embed_preserve`, and their values."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from lora_forge.errors import UsageError, nearest

CHOSEN = ("loss", "initializer", "optimizer")  # run config keys whose value is the name of a plugin, or several
_OWNED = (*CHOSEN, "measure")  # of these, what follows a dot is an option


@dataclass(frozen=True)
class Key:
    """A setting of a run.

    kind: the run config's key, or `weight`. owner: the plugin it belongs to, "" where there is only one. option: one of
    the plugin's; "" where the kind itself is set.
    """

    kind: str
    owner: str = ""
    option: str = ""

    @classmethod
    def read(cls, text: str) -> Key:
        """Raises UsageError."""
        kind, dot, rest = text.strip().partition(".")
        if not dot:
            return cls(kind)
        if kind == "weight" and rest:
            return cls(kind, rest)
        owner, _, option = rest.rpartition(".")
        if kind not in _OWNED:
            raise UsageError(f"{text}: nothing has options under {kind!r}{nearest(kind, (*_OWNED, 'weight'))}")
        if not option:
            raise UsageError(f"{text}: expected {kind}.OPTION or {kind}.NAME.OPTION")
        return cls(kind, owner, option)

    def __str__(self) -> str:
        return ".".join(filter(None, (self.kind, self.owner, self.option)))


def read_pair(text: str, option: str) -> tuple[Key, str]:
    """`KEY=TEXT`. Raises UsageError that names the option of the command line."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip() or not value.strip():
        raise UsageError(f"{option} takes KEY=VALUE, got {text!r}")
    return Key.read(key), value.strip()


def read_value(text: str) -> Any:
    """A value as JSON has it, so that `8` is a number and `"8"` is text; what is no JSON is text, but `none`."""
    try:
        return json.loads(text)
    except ValueError:
        return None if text == "none" else text
