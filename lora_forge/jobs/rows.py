"""The input of a job: one prompt a row, from text, a table or JSON Lines."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lora_forge.config.run import RunConfig
from lora_forge.errors import UsageError, nearest
from lora_forge.files.header import nothing_at
from lora_forge.jobs.overrides import NONE, read_overrides
from lora_forge.jobs.reading import FORMATS, Given, Source
from lora_forge.options import Text, Unfit, check_bounds, read_value

_SUFFIXES = {".txt": "text", ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_LONGEST_NAME = 120  # bytes, so that every file system has room for what is added to a stem
_LONGEST_ERROR = 400
# https://learn.microsoft.com/windows/win32/fileio/naming-a-file
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{digit}" for port in ("com", "lpt") for digit in range(10))}
_SEED = next(field.metadata for field in fields(RunConfig) if field.name == "seed")


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt, and what it asks for.

    number: counted from 1: the line of text or of JSON Lines, the record of a table without its header.
    seed: None for the job's. name: the stem of its files, where the input gives one.
    overrides: a layer for `collect_run_config`; rows that ask for the same have equal JSON.
    error: why the row cannot be used, which costs no other row.
    """

    number: int
    prompt: str
    prompt_2: str | None
    seed: int | None
    name: str | None
    overrides: Mapping[str, Any]
    error: str | None


@dataclass(frozen=True)
class Input:
    """All rows. ignored: the columns that mean nothing to a job."""

    rows: tuple[Row, ...]
    ignored: tuple[str, ...]


def read_rows(source: str, *, column: str | None = None, format: str | None = None) -> Input:
    """The rows of a file, or of standard input if source is `-`.

    format: text, csv, tsv or jsonl; None for what the suffix says, and text of standard input. column: the one that
    holds the prompts.
    Raises UsageError for what cannot be read, holds no row, or has no column of prompts.
    """
    kind = _format(source, format)
    if column is not None and kind == "text":
        raise UsageError(f"text has no columns, and so no column {column!r}; say what it is with --format")
    read = Source(source, kind, column)
    rows: list[Row] = []
    names: set[str] = set()
    for number, given in read:
        try:
            rows.append(_row(number, given, names, typed=kind == "jsonl"))
        except RecursionError:
            rows.append(_unusable(number, "nested too deeply"))
    if not rows:
        raise UsageError(f"{read.shown} holds no prompt; give one {'a line' if kind in ('text', 'jsonl') else 'a row'}")
    return Input(tuple(rows), tuple(read.ignored))


def _format(source: str, asked: str | None) -> str:
    if asked is not None:
        if asked not in FORMATS:
            raise UsageError(f"unknown format {asked!r}{nearest(asked, FORMATS)}")
        return asked
    if source == "-":
        return "text"
    known = _SUFFIXES.get(Path(source).suffix.lower())
    if known is None:
        if not os.path.exists(source):
            raise UsageError(nothing_at(Path(source)))
        if os.path.isdir(source):
            raise UsageError(f"{source!r} is a folder; give a file of prompts")
        raise UsageError(f"{source!r} may be anything; say what it is with --format {', '.join(FORMATS)}")
    return known


def _unusable(number: int, error: str) -> Row:
    return Row(number, "", None, None, None, NONE, _cut(error))


def _row(number: int, given: Given | str, names: set[str], *, typed: bool) -> Row:
    """names: those of earlier rows, to which this row's is added."""
    if isinstance(given, str):
        return _unusable(number, given)
    problems: list[str] = []
    prompt = _text("prompt", given, problems)
    if not problems and not (prompt or "").strip():
        problems.append("prompt: is blank" if prompt else "prompt: is missing")
    prompt_2 = _text("prompt_2", given, problems)
    seed = _seed(given.get("seed"), problems, typed=typed)
    name = _text("name", given, problems)
    others = {key: value for key, value in given.items() if key not in ("prompt", "prompt_2", "seed", "name")}
    overrides, wrong = read_overrides(others, typed=typed)
    problems += [wrong] if wrong else []
    if name is not None and (bad := _name_problem(name, names)):
        problems.append(f"name: {bad}: {name!r}")
        name = None
    if name is not None and not problems:
        names.add(_compared(name))
    return Row(number, prompt or "", prompt_2, seed, name, overrides, _cut("; ".join(problems)) or None)


def _text(key: str, given: Given, problems: list[str]) -> str | None:
    value = given.get(key)
    if value is None:
        return None
    if not isinstance(value, str):
        problems.append(f"{key}: expected text, got {value!r}")
        return None
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        problems.append(f"{key}: is not valid Unicode: {value!r}")
        return None
    return value


def _seed(value: Any, problems: list[str], *, typed: bool) -> int | None:
    if value is None:
        return None
    try:
        seed: int = read_value(int, value if typed else Text(value))
        check_bounds(seed, _SEED)
        return seed
    except Unfit as error:
        problems.append(f"seed: {error}")
        return None


def _name_problem(name: str, taken: set[str]) -> str | None:
    """What keeps a name from being a file's stem on every system. taken: earlier names, as `_compared`."""
    if not name or not all(letter.isalnum() or letter in " _-." for letter in name):
        return "may hold letters, digits, spaces, _, - and . alone"
    if name[0] in ". " or name[-1] in ". ":
        return "may neither start nor end with a dot or a space"
    if len(name.encode()) > _LONGEST_NAME:
        return f"is longer than {_LONGEST_NAME} bytes"
    if _compared(name).partition(".")[0].rstrip() in _RESERVED:
        return "is reserved by Windows"
    return "an earlier row has it" if _compared(name) in taken else None


def _compared(name: str) -> str:
    """What is equal for names that some system takes for one."""
    return unicodedata.normalize("NFKC", name).casefold()


def _cut(error: str) -> str:
    return error if len(error) <= _LONGEST_ERROR else f"{error[:_LONGEST_ERROR]}…"
