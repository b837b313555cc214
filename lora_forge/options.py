"""Typed options of plugins: read from text or from TOML/JSON values, checked, and described.

An options type is a dataclass. Field types: `bool`, `int`, `float`, `str`, `Path`, `Literal`, `Enum`,
`Optional[...]`, `list[...]`, `tuple[...]`. Field metadata: `help`, `min`, `max`, `above`; `read` is a callable that
makes the value of what was given, and raises `Unfit`, where the type alone does not say how.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lora_forge.errors import PluginError, Problem, nearest

_BOUNDS = {"above": ">", "min": "≥", "max": "≤"}
_TRUE = {"true", "yes", "on", "1"}
_FALSE = {"false", "no", "off", "0"}


@dataclass(frozen=True)
class OptionInfo:
    """One option as shown to people: its name, type in words, default (None if required), help, bounds."""

    name: str
    type: str
    default: Any
    required: bool
    help: str
    bounds: str


class Text(str):
    """A value as typed on a command line: it is parsed where the declared type is not text."""


class Unfit(ValueError):
    """A value does not fit its declared type; the message says why."""


def describe_options(options_type: type) -> tuple[OptionInfo, ...]:
    """The options of a dataclass type, in declaration order."""
    hints = get_type_hints(options_type)
    table = []
    for field in dataclasses.fields(options_type):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        default = None
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        elif not required:
            default = field.default
        table.append(
            OptionInfo(
                name=field.name,
                type=type_in_words(hints[field.name]),
                default=plain(default),
                required=required,
                help=str(field.metadata.get("help", "")),
                bounds=_bounds(field.metadata),
            )
        )
    return tuple(table)


def check_declared(options_type: type, name: str) -> None:
    """Raises PluginError for an option whose type no value can be read as, or whose bounds are no numbers."""
    hints = get_type_hints(options_type)
    for field in dataclasses.fields(options_type):
        if not _readable(hints[field.name]):
            raise PluginError(f"{name}: option {field.name!r} has a type that cannot be read: {hints[field.name]!r}")
        for bound in _BOUNDS:
            if not isinstance(field.metadata.get(bound, 0), int | float):
                raise PluginError(f"{name}: option {field.name!r}: {bound!r} must be a number")


def _readable(hint: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType, list, tuple):
        arms = [arm for arm in get_args(hint) if arm not in (type(None), Ellipsis)]
        return bool(arms) and all(map(_readable, arms))
    return get_origin(hint) is Literal or hint in _READERS or (isinstance(hint, type) and issubclass(hint, enum.Enum))


def parse_options(options_type: type, given: Mapping[str, Any], *, key: str) -> tuple[Any, list[Problem]]:
    """Build `options_type` from `given`; a `Text` is parsed, any other value must have the declared type.

    Returns the instance (None if it could not be built) and every mistake, with keys `{key}.{option}`.
    """
    hints = get_type_hints(options_type)
    fields = {field.name: field for field in dataclasses.fields(options_type)}
    problems: list[Problem] = []
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in fields:
            problems.append(Problem(f"{key}.{name}", f"unknown option{nearest(name, fields) or '; it has none'}"))
            continue
        try:
            read = fields[name].metadata.get("read")
            values[name] = read(value) if read else read_value(hints[name], value)
            check_bounds(values[name], fields[name].metadata)
        except Unfit as error:
            problems.append(Problem(f"{key}.{name}", str(error)))
    for info in describe_options(options_type):
        if info.required and info.name not in given:
            problems.append(Problem(f"{key}.{info.name}", "is required"))
    if problems:
        return None, problems
    try:
        return options_type(**values), []
    except Exception as error:  # the dataclass's own __post_init__
        return None, [Problem(key, str(error))]


def options_as_dict(options: Any) -> dict[str, Any]:
    """An options instance as JSON-ready values; `parse_options` of it gives the instance back."""
    return {field.name: plain(getattr(options, field.name)) for field in dataclasses.fields(options)}


def plain(value: Any) -> Any:
    """`value` with enums, paths and tuples turned into what JSON and TOML can hold."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def type_in_words(hint: Any) -> str:
    """A type as an option table shows it: `float`, `list of int`, `'a' | 'b'`."""
    origin = get_origin(hint)
    if origin is Literal:
        return " | ".join(repr(choice) for choice in get_args(hint))
    if origin in (Union, types.UnionType):
        return " or ".join("none" if arm is type(None) else type_in_words(arm) for arm in get_args(hint))
    if origin is list:
        return f"list of {type_in_words(get_args(hint)[0])}"
    if origin is tuple:
        return "(" + ", ".join("…" if arm is Ellipsis else type_in_words(arm) for arm in get_args(hint)) + ")"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return " | ".join(repr(member.value) for member in hint)
    return {Path: "path"}.get(hint, getattr(hint, "__name__", str(hint)))


def read_value(hint: Any, value: Any) -> Any:
    """`value` as the declared type; a `Text` is parsed. Raises Unfit (a ValueError), in words."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _read_union(hint, value)
    if origin is Literal:
        return _read_literal(get_args(hint), value)
    if origin in (list, tuple):
        return _read_sequence(hint, value)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return value if isinstance(value, hint) else hint(_read_literal(tuple(member.value for member in hint), value))
    reader = _READERS.get(hint)
    if reader is None:
        raise Unfit(f"has a type this release cannot read: {hint!r}")
    return reader(value)


def _read_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, Text) and value.lower() in _TRUE | _FALSE:
        return value.lower() in _TRUE
    raise Unfit(f"expected true or false, got {value!r}")


def _read_int(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, Text):
        try:
            return int(value)
        except ValueError:
            pass
    raise Unfit(f"expected an integer, got {value!r}")


def _read_float(value: Any) -> float:
    number: float | None = None
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    elif isinstance(value, Text):
        try:
            number = float(value)
        except ValueError:
            pass
    if number is None:
        raise Unfit(f"expected a number, got {value!r}")
    if not math.isfinite(number):
        raise Unfit(f"expected a finite number, got {value!r}")
    return number


def _read_str(value: Any) -> str:
    if isinstance(value, str):
        return str(value)
    raise Unfit(f"expected text, got {value!r}")


def _read_path(value: Any) -> Path:
    if isinstance(value, str | Path) and str(value):
        return Path(value)
    raise Unfit(f"expected a path, got {value!r}")


_READERS: dict[Any, typing.Callable[[Any], Any]] = {
    bool: _read_bool,
    int: _read_int,
    float: _read_float,
    str: _read_str,
    Path: _read_path,
}


def _read_literal(choices: tuple[Any, ...], value: Any) -> Any:
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
        if isinstance(value, Text) and str(choice) == value:
            return choice
    raise Unfit(f"{value!r} is not a choice{nearest(str(value), map(str, choices))}")


def _read_union(hint: Any, value: Any) -> Any:
    arms = get_args(hint)
    if type(None) in arms and (value is None or (isinstance(value, Text) and value.lower() == "none")):
        return None
    reasons = []
    for arm in arms:
        if arm is type(None):
            continue
        try:
            return read_value(arm, value)
        except Unfit as error:
            reasons.append(str(error))
    raise Unfit(" or ".join(reasons))


def _read_sequence(hint: Any, value: Any) -> Any:
    if isinstance(value, Text):
        text = value.strip()
        try:
            value = json.loads(text) if text.startswith("[") else [Text(part.strip()) for part in text.split(",")]
        except (ValueError, RecursionError) as error:
            raise Unfit(f"expected a list, got {value!r}") from error
    if not isinstance(value, list | tuple):
        raise Unfit(f"expected a list, got {value!r}")
    arms = get_args(hint)
    if get_origin(hint) is list:
        return [read_value(arms[0], item) for item in value]
    if len(arms) == 2 and arms[1] is Ellipsis:
        return tuple(read_value(arms[0], item) for item in value)
    if len(value) != len(arms):
        raise Unfit(f"expected {len(arms)} values, got {len(value)}")
    return tuple(read_value(arm, item) for arm, item in zip(arms, value, strict=True))


def _bounds(metadata: Mapping[str, Any]) -> str:
    return ", ".join(f"{word} {metadata[name]}" for name, word in _BOUNDS.items() if name in metadata)


def check_bounds(value: Any, metadata: Mapping[str, Any]) -> None:
    numbers = value if isinstance(value, list | tuple) else [value]
    for number in numbers:
        if isinstance(number, list | tuple):
            check_bounds(number, metadata)
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        low, high, above = metadata.get("min"), metadata.get("max"), metadata.get("above")
        if (low is not None and number < low) or (high is not None and number > high):
            raise Unfit(f"must be {_bounds(metadata)}, got {number}")
        if above is not None and number <= above:
            raise Unfit(f"must be {_bounds(metadata)}, got {number}")
