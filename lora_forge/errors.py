"""Every error a user can meet, as one hierarchy; the class decides the exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


class LoraForgeError(Exception):
    """Base of all errors raised on purpose; its message is meant for the user. Exit code 1."""

    exit_code = 1


class Terminated(BaseException):
    """SIGTERM, unwinding like Ctrl-C so that nothing half-written stays. Exit code 143."""


class UsageError(LoraForgeError):
    """What was asked cannot be done as asked. Exit code 2."""

    exit_code = 2


def printable(text: str) -> str:
    """Text that may come from anybody's file: what would break a line, or steer a terminal, is escaped."""
    return text if text.isprintable() else repr(text)


def quoted(name: str, most: int = 300) -> str:
    """A name from anybody's file, in quotes, safe to print and cut where it is longer than any real one."""
    return repr(name if len(name) <= most else f"{name[:most]}…")


@dataclass(frozen=True)
class Problem:
    """One mistake in a configuration: the key it is about, and what is wrong with it."""

    key: str
    message: str

    def __str__(self) -> str:
        return f"{printable(self.key)}: {self.message}" if self.key else self.message


class ConfigError(UsageError):
    """Mistakes in a run config, model config or plugin options, all of them at once.

    usable: what could be read all the same, so that whoever can check more of it reports that too.
    """

    def __init__(self, source: str, problems: Iterable[Problem], *, usable: Any = None) -> None:
        self.source, self.usable = source, usable
        self.problems = tuple(problems)
        prefix = f"{source}: " if source else ""
        if len(self.problems) == 1:
            text = f"{prefix}{self.problems[0]}"
        else:
            lines = "\n".join(f"  {problem}" for problem in self.problems)
            text = f"{prefix}{len(self.problems)} mistakes\n{lines}"
        super().__init__(text)


class PluginError(UsageError):
    """A plugin, or a name that a plugin should supply, cannot be used."""


class ModelError(UsageError):
    """The base model cannot be found, read, or used as asked."""


class OutputError(UsageError):
    """The output path cannot be written."""


class ObjectiveError(UsageError):
    """The objective cannot train anything that was asked for."""


class LoraFileError(UsageError):
    """A LoRA file cannot be read, or does not fit the model config."""


class RunFailed(LoraForgeError):
    """A run started and could not end: a term became NaN or infinite, a plugin raised. Exit code 1."""

    def __init__(self, message: str, *, step: int | None = None, term: str | None = None) -> None:
        super().__init__(message)
        self.step = step
        self.term = term


@contextmanager
def blaming(plugin: str, *, term: str | None = None, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Within this a plugin's code runs: whatever it raises, `but` some, becomes a RunFailed that names it."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, (LoraForgeError, *but)):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
        raise RunFailed(f"{plugin} failed: {reason}", term=term) from error


class UndeclaredNeed(RunFailed):
    """A loss asked the batch for something its spec does not declare."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"`, or the known names when none is close, or `""` when there are none."""
    names = sorted(set(known))
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    if not names:
        return ""
    shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    return f"; known: {shown}"
