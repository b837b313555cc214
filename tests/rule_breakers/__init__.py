"""Plugins that each break one rule of their contract and keep all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_forge.records import Spec


@dataclass(frozen=True)
class Breaker:
    """A plugin, the one rule that it breaks, and words that must be in what is said about it.

    what: the plugin in words.
    """

    what: str
    spec: Spec
    rule: str
    words: tuple[str, ...]
    options: Any = None

    def __str__(self) -> str:
        return self.what.replace(" ", "-")
