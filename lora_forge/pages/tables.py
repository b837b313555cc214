"""Cells of sortable tables: what they show, and what they are sorted by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Value:
    """A cell of the table: what it shows, and what it is sorted by."""

    text: str
    key: float | str


def words(text: str) -> Value:
    """A cell of text."""
    return Value(text, text)


def number(value: float | None, text: str | None = None) -> Value:
    """A cell of a number, shown as `text` says or with four digits; a dash, sorted last, where it is not known."""
    return Value("–", "") if value is None else Value(shown(value) if text is None else text, float(value))


def shown(value: float | None, digits: int = 4) -> str:
    """A number in a few digits, or a dash."""
    return "–" if value is None else f"{value:.{digits}g}"
