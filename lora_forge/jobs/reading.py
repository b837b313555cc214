"""Text, CSV, TSV and JSON Lines as numbered rows of what each key was given."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Never, TextIO, TypeAlias

from lora_forge.errors import UsageError, nearest, printable, quoted
from lora_forge.files.header import nothing_at
from lora_forge.jobs.columns import Ambiguous, keys_of

FORMATS = ("text", "csv", "tsv", "jsonl")
Given: TypeAlias = Mapping[str, Any]  # the keys of `keys_of`; a row has those alone that it gives
_VERBATIM = ("prompt", "prompt_2")  # of other cells, spaces around a value are no part of it


class Source:
    """Numbered rows of one input, read once: what each gives, or, as text, why it cannot be read.

    shown: what to call the input. ignored: after reading, the columns that mean nothing, in their order.
    """

    def __init__(self, source: str, format: str, column: str | None) -> None:
        self.shown = "standard input" if source == "-" else quoted(source)
        self.ignored: dict[str, None] = {}
        self._source, self._format, self._column = source, format, column

    def __iter__(self) -> Iterator[tuple[int, Given | str]]:
        """Raises UsageError for an input that is unreadable, or has no column of prompts."""
        try:
            with _opened(self._source, self.shown, newline="" if self._format in ("csv", "tsv") else None) as stream:
                if self._format == "text":
                    yield from _text_lines(stream)
                elif self._format == "jsonl":
                    yield from self._objects(stream)
                else:
                    yield from self._records(stream)
        except UnicodeError as error:
            told = "; it looks like UTF-16" if getattr(error, "object", b"")[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
            raise UsageError(f"{self.shown} is not UTF-8 text{told}; save it as UTF-8") from error
        except OSError as error:
            raise UsageError(f"{self.shown} cannot be read: {error.strerror or error}") from error

    def _records(self, stream: TextIO) -> Iterator[tuple[int, Given | str]]:
        records = _csv_records(stream, self.shown) if self._format == "csv" else _tsv_records(stream)
        with _fields_of_any_length():
            header = next((record for record in records if any(record)), None)
            if header is None:
                return
            if isinstance(header, str):
                raise UsageError(f"{self.shown}: the header cannot be read: {header}")
            keys = self._keys_of_header(header)
            for number, record in enumerate((record for record in records if record), 1):
                if isinstance(record, str):
                    yield number, record
                elif len(record) > len(keys):
                    yield number, f"has {len(record)} fields, the header {len(keys)}"
                elif any(record):
                    yield number, _given(keys, record)

    def _keys_of_header(self, header: list[str]) -> tuple[str | None, ...]:
        try:
            keys = keys_of(header, self._column)
        except (Ambiguous, UsageError) as error:
            raise UsageError(f"{self.shown}: {error}") from error
        if "prompt" not in keys:
            if self._column is None and keys == (None,) and not _splits(header[0]):
                return ("prompt",)
            self._no_prompts(header)
        self.ignored |= {name: None for name, key in zip(header, keys, strict=True) if key is None and name}
        return keys

    def _objects(self, stream: TextIO) -> Iterator[tuple[int, Given | str]]:
        keys_of_names = lru_cache(maxsize=1024)(keys_of)
        seen: dict[str, None] = {}
        found = False
        for number, line in enumerate(stream, 1):
            text = line.strip()
            if not text:
                continue
            try:
                value = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
                value = {self._column or "prompt": value} if isinstance(value, str) else value
                if not isinstance(value, dict):
                    raise ValueError("expected an object or a string")
                keys = keys_of_names(tuple(value), self._column)
            except UsageError as error:
                raise UsageError(f"{self.shown}, line {number}: {error}") from error
            except Ambiguous as error:
                yield number, str(error)
            except json.JSONDecodeError as error:
                yield number, f"is no JSON: {error.msg}, column {error.colno}"
            except ValueError as error:
                yield number, f"is no row: {error}"
            except RecursionError:
                yield number, "is no row: nested too deeply"
            else:
                seen |= dict.fromkeys(value)
                self.ignored |= {name: None for name, key in zip(value, keys, strict=True) if key is None}
                found = found or "prompt" in keys
                pairs = zip(keys, value.values(), strict=True)
                yield number, {key: one for key, one in pairs if key is not None and one is not None}
        if seen and not found:
            self._no_prompts(list(seen))

    def _no_prompts(self, names: list[str]) -> Never:
        shown = [printable(name) for name in names]
        listed = ", ".join(name[:60] for name in shown[:12]) + (", …" if shown[12:] else "")
        if self._column is not None:
            meant = nearest(self._column, shown) if len(shown) <= 1000 else f"; it has {listed}"
            raise UsageError(f"{self.shown} has no column {self._column!r}{meant}")
        told = _splits(names[0]) if len(names) == 1 else ""
        told = told or "say which holds the prompts with --column"
        raise UsageError(f"{self.shown} has no column 'prompt', it has {listed}; {told}")


@contextmanager
def _opened(source: str, shown: str, *, newline: str | None) -> Iterator[TextIO]:
    if source != "-":
        try:
            file = open(source, encoding="utf-8-sig", newline=newline)  # noqa: SIM115
        except FileNotFoundError as error:
            raise UsageError(nothing_at(Path(source))) from error
        except IsADirectoryError as error:
            raise UsageError(f"{shown} is a folder; give a file of prompts") from error
        except (OSError, ValueError) as error:  # a ValueError: a path with a NUL in it
            raise UsageError(f"{shown} cannot be read: {getattr(error, 'strerror', None) or error}") from error
        with file:
            yield file
        return
    if sys.stdin is None:
        raise UsageError("standard input is closed; give a file of prompts")
    stream = io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig", newline=newline)
    try:
        yield stream
    finally:
        stream.detach()  # standard input is not ours to close


def _text_lines(stream: TextIO) -> Iterator[tuple[int, Given]]:
    for number, line in enumerate(stream, 1):
        if prompt := line.strip():
            yield number, {"prompt": prompt}


def _given(keys: tuple[str | None, ...], record: list[str]) -> Given:
    given = {}
    for key, cell in zip(keys, record, strict=False):
        if key is not None and (value := cell if key in _VERBATIM else cell.strip()):
            given[key] = value
    return given


def _csv_records(stream: TextIO, shown: str) -> Iterator[list[str] | str]:
    """Records, or why one cannot be read. Raises UsageError where a quote is never closed: what follows is lost."""
    reader = csv.reader(stream, strict=True)
    while True:
        first = reader.line_num + 1
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "end of data" in str(error):
                raise UsageError(f"{shown}: a quote that opens in or after line {first} is never closed") from error
            lines = f"line {first}" if reader.line_num == first else f"lines {first} to {reader.line_num}"
            yield f"{lines}: {error}"


def _tsv_records(stream: TextIO) -> Iterator[list[str]]:
    """Records, quoted as spreadsheets quote them. A line that cannot be is read as it is: much TSV is never quoted."""
    lines = _Lines(stream)
    reader = csv.reader(lines, delimiter="\t", strict=True)
    while True:
        lines.taken.clear()
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error:
            first, *rest = lines.taken
            lines.ahead.extendleft(reversed(rest))
            yield first.rstrip("\r\n").split("\t")


class _Lines:
    """Lines that can be given back: `taken` since they were last counted, `ahead` to be read again."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.taken: list[str] = []
        self.ahead: deque[str] = deque()

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self.ahead.popleft() if self.ahead else next(self._stream)
        self.taken.append(line)
        return line


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _splits(name: str) -> str:
    """What to do about a table's only column, if its name is that of several."""
    others = {";": "separate columns by commas, not by ;", "\t": "say --format tsv", ",": "say --format csv"}
    for separator, told in others.items():
        first, *more = (part.strip().lower() for part in name.split(separator))
        if more and "prompt" in (first, *more):
            return told
    return ""


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"key {quoted(counts.most_common(1)[0][0])} appears twice")
    return value


def _no_constant(name: str) -> Never:
    raise ValueError(f"{name} is no JSON")
