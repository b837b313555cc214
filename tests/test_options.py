"""Options: each type from text and from values, bounds, and every mistake in words."""

from __future__ import annotations

import enum
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_forge.errors import Problem
from lora_forge.options import Text, Unfit, describe_options, options_as_dict, parse_options, read_value


class Color(enum.Enum):
    RED = "red"
    DEEP_BLUE = "deep-blue"
    THIRD = 3


@dataclass(frozen=True)
class Options:
    flag: bool = False
    size: int = field(default=3, metadata={"min": 1, "max": 10, "help": "how many"})
    rate: float = field(default=0.5, metadata={"above": 0, "help": "how fast"})
    word: str = ""
    folder: Path | None = None
    mode: Literal["fast", "slow", 2] = "fast"
    color: Color = Color.RED
    limit: int | None = None
    either: int | str = 0
    sizes: list[int] = field(default_factory=list)
    words: tuple[str, ...] = ()
    betas: tuple[float, float] = field(default=(0.9, 0.999), metadata={"min": 0, "max": 1})
    pairs: list[tuple[int, float]] = field(default_factory=list)
    places: tuple[Path, ...] = ()
    colors: list[Color] = field(default_factory=list)


@dataclass(frozen=True)
class Demanding:
    size: int
    rate: float
    word: str = "x"


@dataclass(frozen=True)
class Choosy:
    low: int = 0
    high: int = 1

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError("low is above high")


@dataclass(frozen=True)
class NoneAtAll:
    pass


def parse(given: dict[str, Any]) -> Any:
    """The options, where nothing is wrong with them."""
    options, problems = parse_options(Options, given, key="thing")
    assert problems == []
    return options


def mistakes(given: dict[str, Any], options_type: type = Options) -> list[str]:
    options, problems = parse_options(options_type, given, key="thing")
    assert options is None
    return [str(problem) for problem in problems]


@pytest.mark.parametrize(
    ("hint", "text", "value"),
    [
        (bool, "true", True),
        (bool, "Yes", True),
        (bool, "on", True),
        (bool, "1", True),
        (bool, "false", False),
        (bool, "No", False),
        (bool, "off", False),
        (bool, "0", False),
        (int, "12", 12),
        (int, "-3", -3),
        (float, "1e-4", 1e-4),
        (float, "2", 2.0),
        (str, "none", "none"),
        (str, "12", "12"),
        (str, "", ""),
        (Path, "a/b.txt", Path("a/b.txt")),
        (Literal["a", 2], "a", "a"),
        (Literal["a", 2], "2", 2),
        (Color, "deep-blue", Color.DEEP_BLUE),
        (Color, "3", Color.THIRD),
        (int | None, "none", None),
        (int | None, "4", 4),
        (int | str, "4", 4),
        (int | str, "four", "four"),
        (list[int], "1, 2,3", [1, 2, 3]),
        (list[int], "[1, 2]", [1, 2]),
        (list[int], "[]", []),
        (list[str], "a,b", ["a", "b"]),
        (list[bool], "yes,no", [True, False]),
        (tuple[float, float], "0.9,0.99", (0.9, 0.99)),
        (tuple[int, str], "1,a", (1, "a")),
        (tuple[int, ...], "7", (7,)),
        (list[tuple[int, float]], "[[1, 2.5], [3, 4]]", [(1, 2.5), (3, 4.0)]),
        (list[Color], "red,deep-blue", [Color.RED, Color.DEEP_BLUE]),
        (tuple[Path, ...], "a,b/c", (Path("a"), Path("b/c"))),
    ],
)
def test_text_is_read_as_the_declared_type(hint: Any, text: str, value: Any) -> None:
    result = read_value(hint, Text(text))
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("hint", "given", "value"),
    [
        (bool, True, True),
        (int, 12, 12),
        (float, 12, 12.0),
        (float, 1.5, 1.5),
        (str, "x", "x"),
        (Path, "a", Path("a")),
        (Path, Path("a"), Path("a")),
        (Literal["a", 2], 2, 2),
        (Color, "red", Color.RED),
        (Color, Color.THIRD, Color.THIRD),
        (int | None, None, None),
        (list[int], (1, 2), [1, 2]),
        (tuple[int, ...], [1, 2], (1, 2)),
        (tuple[float, float], [0, 1], (0.0, 1.0)),
    ],
)
def test_a_value_of_the_declared_type_is_taken(hint: Any, given: Any, value: Any) -> None:
    result = read_value(hint, given)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("hint", "given", "message"),
    [
        (bool, 1, "expected true or false, got 1"),
        (bool, "true", "expected true or false, got 'true'"),
        (bool, Text("maybe"), "expected true or false, got 'maybe'"),
        (int, "12", "expected an integer, got '12'"),
        (int, True, "expected an integer, got True"),
        (int, 1.0, "expected an integer, got 1.0"),
        (int, Text("1.0"), "expected an integer, got '1.0'"),
        (int, Text(""), "expected an integer, got ''"),
        (float, "1.5", "expected a number, got '1.5'"),
        (float, False, "expected a number, got False"),
        (float, Text("fast"), "expected a number, got 'fast'"),
        (float, math.nan, "expected a finite number, got nan"),
        (float, -math.inf, "expected a finite number, got -inf"),
        (float, Text("inf"), "expected a finite number, got 'inf'"),
        (float, Text("1e999"), "expected a finite number, got '1e999'"),
        (float, 10**400, "expected a finite number, got 1000"),
        (str, 5, "expected text, got 5"),
        (str, None, "expected text, got None"),
        (Path, "", "expected a path, got ''"),
        (Path, 5, "expected a path, got 5"),
        (Literal["fast", "slow"], "fats", "'fats' is not a choice; did you mean 'fast'?"),
        (Literal[1, 2], "1", "'1' is not a choice"),
        (Literal[1, 2], True, "True is not a choice"),
        (Color, "deep-bleu", "'deep-bleu' is not a choice; did you mean 'deep-blue'?"),
        (Color, "3", "'3' is not a choice"),
        (int | None, "none", "expected an integer, got 'none'"),
        (int | bool, "x", "expected an integer, got 'x' or expected true or false, got 'x'"),
        (list[int], 1, "expected a list, got 1"),
        (list[int], "1,2", "expected a list, got '1,2'"),
        (list[int], ["1"], "expected an integer, got '1'"),
        (list[int], Text("1,x"), "expected an integer, got 'x'"),
        (list[int], Text("[1, 2"), "expected a list, got '[1, 2'"),
        (list[int], Text('["1"]'), "expected an integer, got '1'"),
        (list[float], Text("[NaN]"), "expected a finite number, got nan"),
        (list[int], Text("[" * 100_000), "expected a list"),
        (tuple[float, float], [1.0], "expected 2 values, got 1"),
        (tuple[float, float], Text("1,2,3"), "expected 2 values, got 3"),
        (dict[str, int], {"a": 1}, "has a type this release cannot read"),
    ],
)
def test_what_is_not_of_the_declared_type_is_refused_in_words(hint: Any, given: Any, message: str) -> None:
    with pytest.raises(Unfit) as caught:
        read_value(hint, given)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("size", 0, "thing.size: must be ≥ 1, ≤ 10, got 0"),
        ("size", 11, "thing.size: must be ≥ 1, ≤ 10, got 11"),
        ("rate", 0, "thing.rate: must be > 0, got 0.0"),
        ("rate", Text("-1"), "thing.rate: must be > 0, got -1.0"),
        ("betas", (0.5, 1.5), "thing.betas: must be ≥ 0, ≤ 1, got 1.5"),
    ],
)
def test_bounds_hold_for_numbers_and_for_each_number_of_a_list(name: str, value: Any, message: str) -> None:
    assert mistakes({name: value}) == [message]


def test_the_bounds_themselves_are_allowed() -> None:
    assert (parse({"size": 1}).size, parse({"size": 10}).size, parse({"betas": [0, 1]}).betas) == (1, 10, (0.0, 1.0))


def test_an_unknown_option_is_named_with_the_nearest_known_one() -> None:
    assert mistakes({"sise": 3}) == ["thing.sise: unknown option; did you mean 'size'?"]
    assert mistakes({"q": 3}, Demanding)[0] == "thing.q: unknown option; known: rate, size, word"
    assert mistakes({"q": 3}, NoneAtAll) == ["thing.q: unknown option; it has none"]


def test_all_mistakes_are_told_at_once() -> None:
    options, problems = parse_options(Demanding, {"size": "3", "wrod": "y"}, key="thing")
    assert options is None
    assert problems == [
        Problem("thing.size", "expected an integer, got '3'"),
        Problem("thing.wrod", "unknown option; did you mean 'word'?"),
        Problem("thing.rate", "is required"),
    ]


def test_what_the_options_type_itself_refuses_is_a_mistake_too() -> None:
    assert mistakes({"low": 3}, Choosy) == ["thing: low is above high"]


def test_options_are_described_with_type_default_bounds_and_help() -> None:
    described = {info.name: info for info in describe_options(Options)}
    assert list(described) == list(Options.__dataclass_fields__)
    size = described["size"]
    assert (size.type, size.default, size.required, size.help, size.bounds) == (
        "int",
        3,
        False,
        "how many",
        "≥ 1, ≤ 10",
    )
    assert described["rate"].bounds == "> 0"
    assert described["color"].default == "red"
    assert {name: info.type for name, info in described.items() if name not in ("size", "rate")} == {
        "flag": "bool",
        "word": "str",
        "folder": "path or none",
        "mode": "'fast' | 'slow' | 2",
        "color": "'red' | 'deep-blue' | 3",
        "limit": "int or none",
        "either": "int or str",
        "sizes": "list of int",
        "words": "(str, …)",
        "betas": "(float, float)",
        "pairs": "list of (int, float)",
        "places": "(path, …)",
        "colors": "list of 'red' | 'deep-blue' | 3",
    }
    assert [info.required for info in describe_options(Demanding)] == [True, True, False]


numbers = st.floats(allow_nan=False, allow_infinity=False)
shares = st.floats(0, 1)
paths = st.text("abc/. é", min_size=1).map(Path)
all_options = st.builds(
    Options,
    flag=st.booleans(),
    size=st.integers(1, 10),
    rate=st.floats(0, exclude_min=True, allow_infinity=False),
    word=st.text(),
    folder=st.none() | paths,
    mode=st.sampled_from(["fast", "slow", 2]),
    color=st.sampled_from(Color),
    limit=st.none() | st.integers(),
    either=st.integers() | st.text(),
    sizes=st.lists(st.integers()),
    words=st.lists(st.text()).map(tuple),
    betas=st.tuples(shares, shares),
    pairs=st.lists(st.tuples(st.integers(), numbers)),
    places=st.lists(paths).map(tuple),
    colors=st.lists(st.sampled_from(Color)),
)


@settings(deadline=None)
@given(all_options)
def test_options_as_dict_goes_through_json_and_gives_the_options_back(options: Options) -> None:
    assert parse(options_as_dict(options)) == options
    assert parse(json.loads(json.dumps(options_as_dict(options)))) == options


@settings(deadline=None)
@given(st.integers(), numbers, st.booleans(), st.text())
def test_what_a_value_prints_as_is_read_back_from_text(whole: int, number: float, flag: bool, text: str) -> None:
    assert read_value(int, Text(whole)) == whole
    assert read_value(float, Text(number)) == number
    assert read_value(bool, Text(flag)) is flag
    assert read_value(str, Text(text)) == text


@settings(deadline=None)
@given(st.text(), st.sampled_from([bool, int, float, str, Path, Color, int | None, list[int], tuple[float, float]]))
def test_any_text_is_read_or_refused_but_never_breaks(text: str, hint: Any) -> None:
    try:
        value = read_value(hint, Text(text))
    except Unfit:
        return
    assert read_value(hint, value) == value
