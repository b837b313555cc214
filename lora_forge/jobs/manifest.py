"""The record of a job: what it is, and what became of each row, from which it goes on after it was stopped."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from lora_forge.errors import LoraForgeError, OutputError
from lora_forge.output import json_line

if TYPE_CHECKING:
    from upath import UPath

    from lora_forge.output import Place

FORMAT = 1
NAME = "manifest.jsonl"
_PART = re.compile(r"(\d{6,})\.jsonl\Z")
_AT_ONCE = 1000  # parts that are fetched together


class Manifest:
    """`manifest.jsonl` in the job's folder: a line about the job, then a line for each row that was tried.

    header: the job's own line, None for a new job. rows: by id, the last line of each.
    At a URL it is kept in parts, `manifest/000001.jsonl` and so on, since object stores cannot append.
    """

    def __init__(self, log: _Log, shown: str) -> None:
        self.header: Mapping[str, Any] | None = None
        self.rows: dict[str, dict[str, Any]] = {}
        self._log, self._shown = log, shown

    @classmethod
    def open(cls, folder: Place) -> Manifest:
        """The manifest of a job in this folder, which need not exist; nothing is made or changed yet.

        Until it is closed, no other job of this machine can open it, where the file system knows locks.
        Raises OutputError for one that cannot be read, or that another job holds.
        """
        log: _Log = _File(folder / NAME) if isinstance(folder, Path) else _Parts(folder)
        manifest = cls(log, repr(str(folder)))
        try:
            for shown, line in log.read():
                manifest._take(shown, line)
        except BaseException:
            log.release()
            raise
        return manifest

    def begin(self, header: Mapping[str, Any]) -> None:
        """Write the job's own line. Raises OutputError if there is one, or it cannot be written."""
        if self.header is not None:
            raise OutputError(f"a job was begun in {self._shown} already")
        line = {"format": FORMAT, **header}
        self._log.append(_encoded([line]))
        self.header = line

    def add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write lines about rows, each with its `id`: all at once, or none. Raises OutputError."""
        assert self.header is not None, "begin the job first"
        ids = [str(line["id"]) for line in lines]
        if lines:
            self._log.append(_encoded(lines))
            self.rows |= {one: dict(line) for one, line in zip(ids, lines, strict=True)}

    def close(self) -> None:
        """Let other jobs have it. At a URL, the whole is written as one file too. Raises OutputError."""
        if self.header is not None:
            self._log.finish(_encoded([line]) for line in (self.header, *self.rows.values()))
        self._log.release()

    def _take(self, shown: str, line: dict[str, Any]) -> None:
        if self.header is not None:
            if not isinstance(line.get("id"), str):
                raise OutputError(f"{shown} has no id; is {self._shown} the folder of a job?")
            self.rows[line["id"]] = line
        elif type(line.get("format")) is not int:
            raise OutputError(f"{shown} is not about a job of lora-forge's; give another folder")
        elif line["format"] != FORMAT:
            told = f"has format {line['format']}, and this lora-forge reads format {FORMAT}"
            raise OutputError(f"{shown} {told}; go on with the one that began the job, or give another folder")
        else:
            self.header = line


class _Log(Protocol):
    """Where lines are kept."""

    def read(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every line there is, and what to call it."""

    def append(self, lines: bytes) -> None:
        """Keep whole lines, or none of them."""

    def finish(self, lines: Iterable[bytes]) -> None:
        """Nothing more is appended; these are all lines."""

    def release(self) -> None:
        """Let others have it."""


class _File:
    """One file of this machine, which is locked while it is open."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._end = 0  # of the last whole line
        self._whole = True  # whether that ends as a line does

    def read(self) -> Iterator[tuple[str, dict[str, Any]]]:
        with _refusing(self._path, "read"):
            if not os.path.lexists(self._path):
                return
            self._file = self._opened("r+b")
            for shown, line, value in _values(self._file, str(self._path)):
                self._end += len(line)
                self._whole = line.endswith(b"\n")
                yield shown, value

    def append(self, lines: bytes) -> None:
        with _refusing(self._path, "written"):
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._opened("x+b")
            file = self._file.fileno()
            os.ftruncate(file, self._end)  # what a crash, or a full disk, left of a line
            os.lseek(file, self._end, os.SEEK_SET)
            rest = memoryview(lines if self._whole else b"\n" + lines)
            written = len(rest)
            while rest:
                rest = rest[os.write(file, rest) :]
            self._end += written
            self._whole = True

    def finish(self, lines: Iterable[bytes]) -> None:
        pass

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self, mode: str) -> IO[bytes]:
        """The file, locked. Raises OutputError where another job has the lock, or has made the file meanwhile."""
        try:
            file: IO[bytes] = open(self._path, mode)  # noqa: SIM115
        except FileExistsError:
            raise self._busy() from None
        if not _lock(file):
            file.close()
            raise self._busy()
        return file

    def _busy(self) -> OutputError:
        return OutputError(f"another job is at work in {str(self._path.parent)!r}")


def _lock(file: IO[bytes]) -> bool:
    """Whether nobody else has the lock of this file, which ends when it is closed, or its process does."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows, or a file system without locks
        pass
    return True


class _Parts:
    """Objects of a store, each written once, and at the end one of them all, for whoever wants a single file."""

    def __init__(self, folder: UPath) -> None:
        self._folder, self._fs = folder, folder.fs
        path = folder.path.rstrip("/")
        self._parts, self._all = f"{path}/manifest", f"{path}/{NAME}"
        self._last = 0
        self._before = b""  # of a job of which the one file is left, and none of the parts

    def read(self) -> Iterator[tuple[str, dict[str, Any]]]:
        with _refusing(self._folder, "read"):
            numbers = self._numbers()
            self._last = max(numbers, default=0)
            for start in range(0, len(numbers), _AT_ONCE):
                paths = [self._path(number) for number in numbers[start : start + _AT_ONCE]]
                for path, content in zip(paths, self._contents(paths), strict=True):
                    for shown, _, value in _values(BytesIO(content), path):
                        yield shown, value
            if not numbers and self._fs.exists(self._all):
                (content,) = self._contents([self._all])
                whole = list(_values(BytesIO(content), self._all))
                self._before = b"".join(line.rstrip(b"\n") + b"\n" for _, line, _ in whole)
                yield from ((shown, value) for shown, _, value in whole)

    def append(self, lines: bytes) -> None:
        path = self._path(self._last + 1)
        with _refusing(self._folder, "written"):
            try:
                self._fs.pipe_file(path, self._before + lines)
            except FileNotFoundError:  # a store that has real folders
                self._fs.makedirs(self._parts, exist_ok=True)
                self._fs.pipe_file(path, self._before + lines)
        self._last += 1
        self._before = b""

    def finish(self, lines: Iterable[bytes]) -> None:
        with _refusing(self._folder, "written"), self._fs.open(self._all, "wb") as file:
            for line in lines:
                file.write(line)

    def release(self) -> None:
        pass

    def _path(self, number: int) -> str:
        return f"{self._parts}/{number:06d}.jsonl"

    def _numbers(self) -> list[int]:
        self._fs.invalidate_cache()
        try:
            names = [str(one).rpartition("/")[2] for one in self._fs.ls(self._parts, detail=False)]
        except FileNotFoundError:
            return []
        return sorted(int(match.group(1)) for match in map(_PART.match, names) if match)

    def _contents(self, paths: list[str]) -> list[bytes]:
        """Of all at once where the store can, and by their names as they are, though these may hold a * or [."""
        nothing = [None] * len(paths)
        contents = self._fs.cat_ranges(paths, nothing, nothing, on_error="return")
        for content in contents:
            if isinstance(content, Exception):
                raise content
        return list(contents)


def _values(lines: Iterable[bytes], name: str) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    """Each line: what to call it, as it is, and its value. What a crash left of a last one is left out."""
    for number, line in enumerate(lines, 1):
        shown = f"{name!r}, line {number},"
        try:
            value = json.loads(line.decode(), object_pairs_hook=_interned)
        except (ValueError, RecursionError) as error:
            if not line.endswith(b"\n"):
                return
            raise OutputError(f"{shown} is not JSON; mend it, or give another folder") from error
        if not isinstance(value, dict):
            raise OutputError(f"{shown} is no JSON object; mend it, or give another folder")
        yield shown, line, value


def _interned(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A million lines have the same keys."""
    return {sys.intern(key): value for key, value in pairs}


def _encoded(lines: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join(json_line(line).encode("utf-8", "backslashreplace") + b"\n" for line in lines)


@contextmanager
def _refusing(place: Place, done: str) -> Iterator[None]:
    """Whatever the disk, or the package that serves a store, raises becomes an OutputError."""
    try:
        yield
    except LoraForgeError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise OutputError(f"the manifest at {str(place)!r} cannot be {done}: {reason}") from error
