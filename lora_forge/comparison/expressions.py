"""Objectives as people write them in one line: `C + 0.1*D(target="an owl, brass", layers=2)`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

from lora_forge.config.run import Choice, parse_term
from lora_forge.errors import Problem
from lora_forge.options import Text
from lora_forge.schedules import TermSchedule

CONSTANT = "constant"  # the schedule of a term that has none

_WEIGHT = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*\*\s*")
_NAME = re.compile(r"(\w[^\s+*/(),=\"]*)\s*")
_SIGN = re.compile(r"([+-])\s*")
_OPEN, _CLOSE, _COMMA = (re.compile(rf"({mark})\s*") for mark in (r"\(", r"\)", ","))
_KEY = re.compile(r"([^\W\d]\w*)\s*=\s*")
_BARE = re.compile(r"([^,()\"\[]*[^,()\"\[\s])\s*")
_JSON = json.JSONDecoder()


def parse_expression(text: str) -> tuple[tuple[Choice, ...], list[Problem]]:
    """The terms of an objective written as a sum, and what is wrong with it.

    A term is `[weight*]name[(key=value, …)]`; the name may be `dist:name`, and carry a weight and a schedule as in
    `name:0.1@linear`. A value is text up to the next comma or parenthesis, JSON text in double quotes, or a JSON list;
    it stays a `Text`, since its type is known only with its loss.
    """
    parser = _Parser(text)
    try:
        return parser.terms(), parser.problems
    except _Unread as error:
        where = f"at character {error.position + 1}" if error.position < len(text) else "at the end"
        return (), [*parser.problems, parser.problem(f"{where}: {error}")]


def write_expression(terms: Sequence[Choice]) -> str:
    """The expression of these terms; parsed, it gives them back, with the values of options as text."""
    first, *others = terms
    return _written(first) + "".join(
        f" - {_written(replace(term, weight=-term.weight))}" if term.weight < 0 else f" + {_written(term)}"
        for term in others
    )


def _written(term: Choice) -> str:
    weight = "" if term.weight == 1 else f"{repr(term.weight).removesuffix('.0')}*"
    options = ", ".join(f"{key}={_value(value)}" for key, value in term.options.items())
    schedule = "" if term.schedule == CONSTANT else f"@{term.schedule}"
    return f"{weight}{term.name}{schedule}" + (f"({options})" if options else "")


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    bare = _BARE.fullmatch(text) and text == text.strip()
    return text if bare or _is_list(text) else json.dumps(text, ensure_ascii=False)


def _is_list(text: str) -> bool:
    """Whether this is read as a JSON list, and comes out as it is written."""
    try:
        return text.startswith("[") and _JSON.raw_decode(text)[1] == len(text)
    except (ValueError, RecursionError):
        return False


class _Unread(ValueError):
    """What is at a position is none of what could stand there."""

    def __init__(self, position: int, message: str) -> None:
        super().__init__(message)
        self.position = position


class _Parser:
    """Reads an expression from left to right. problems: mistakes after which reading can go on."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = len(text) - len(text.lstrip())
        self.problems: list[Problem] = []

    def problem(self, message: str) -> Problem:
        return Problem(f"loss {self._text!r}", message)

    def terms(self) -> tuple[Choice, ...]:
        terms = [self._term(self._take(_SIGN))]
        while self._at < len(self._text):
            terms.append(self._term(self._take(_SIGN) or self._fail("+ or the end")))
        return tuple(terms)

    def _term(self, sign: str | None) -> Choice:
        weight = self._take(_WEIGHT)
        name, suffix, schedule = parse_term(self._take(_NAME) or self._fail("the name of a loss"))
        options = self._options(name) if self._take(_OPEN) else {}
        if suffix is not None and (weight is not None or parse_term(name)[1] is not None):
            self.problems.append(self.problem(f"{name} has two weights"))
        value = float(weight) if weight is not None else 1.0 if suffix is None else suffix
        if not math.isfinite(value):
            self.problems.append(self.problem(f"the weight of {name} is not finite"))
        try:
            TermSchedule.read(schedule or CONSTANT)
        except ValueError as error:
            self.problems.append(self.problem(f"{name}: {error}"))
            schedule = CONSTANT
        return Choice(name, options, -value if sign == "-" else value, schedule or CONSTANT)

    def _options(self, name: str) -> dict[str, Text]:
        options: dict[str, Text] = {}
        while not self._take(_CLOSE):
            if options and not self._take(_COMMA):
                self._fail('a comma or ")"; text that holds one of them stands in double quotes')
            key = self._take(_KEY) or self._fail("KEY=VALUE")
            if key in options:
                self.problems.append(self.problem(f"{name} is given {key} twice"))
            options[key] = Text(self._value())
        return options

    def _value(self) -> str:
        start = self._at
        if self._text[start : start + 1] not in ('"', "["):
            return self._take(_BARE) or self._fail("a value")
        try:
            value, end = _JSON.raw_decode(self._text, start)
        except (ValueError, RecursionError) as error:
            what = "text in double quotes" if self._text[start] == '"' else "a list"
            raise _Unread(start, f"{what} that is not as JSON has it") from error
        self._at = len(self._text) - len(self._text[end:].lstrip())
        return value if isinstance(value, str) else self._text[start:end]

    def _take(self, pattern: re.Pattern[str]) -> str | None:
        """The first group, if the pattern matches here; what is matched is read."""
        match = pattern.match(self._text, self._at)
        if match is None:
            return None
        self._at = match.end()
        return match.group(1)

    def _fail(self, expected: str) -> NoReturn:
        rest = self._text[self._at :]
        found = f", found {rest[:20]!r}" if rest else ""
        raise _Unread(self._at, f"expected {expected}{found}")
