"""Objectives written in one line, and read back."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_forge.comparison.expressions import parse_expression, write_expression
from lora_forge.config.run import Choice

NAMES = st.from_regex(r"[a-z_][a-z0-9_.-]{0,8}", fullmatch=True)
CHOICES = st.builds(
    Choice,
    name=st.one_of(NAMES, st.builds("{}:{}".format, NAMES, st.from_regex(r"[a-z]_[a-z0-9_]{0,8}", fullmatch=True))),
    options=st.dictionaries(st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True), st.text(min_size=1), max_size=3),
    weight=st.floats(allow_nan=False, allow_infinity=False),
    schedule=st.sampled_from(["constant", "linear", "cosine_up:3-20"]),
)


def parsed(text: str) -> tuple[Choice, ...]:
    terms, problems = parse_expression(text)
    assert not problems
    return terms


def mistakes(text: str) -> list[str]:
    return [str(problem).removeprefix(f"loss {text!r}: ") for problem in parse_expression(text)[1]]


def test_a_name_alone_is_an_objective() -> None:
    assert parsed("embedding_magnitude") == (Choice("embedding_magnitude"),)


def test_terms_are_added_with_their_weights() -> None:
    expected = (Choice("C"), Choice("D", {}, 0.1), Choice("E", {}, -2.0), Choice("F", {}, 1e-3), Choice("G", {}, -1.0))
    assert parsed("C + 0.1*D - 2 * E+1e-3*F - G") == expected
    assert parsed("-0.5*C + -.5*D") == (Choice("C", {}, -0.5), Choice("D", {}, -0.5))


def test_weight_and_schedule_may_stand_behind_the_name_as_run_has_them() -> None:
    assert parsed("C + D:0.1 + dist:E:2") == (Choice("C"), Choice("D", {}, 0.1), Choice("dist:E", {}, 2.0))
    assert parsed("C@linear + 2*D@cosine:10-40(a=1)") == (
        Choice("C", schedule="linear"),
        Choice("D", {"a": "1"}, 2.0, "cosine:10-40"),
    )
    assert parsed("2*my-dist:my-loss.v2") == (Choice("my-dist:my-loss.v2", {}, 2.0),)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("D(a=1)", {"a": "1"}),
        ("D( a = 1.5 , b = an owl's nest )", {"a": "1.5", "b": "an owl's nest"}),
        ('D(a="an owl, (brass) + \\"x\\"", b=@file.txt)', {"a": 'an owl, (brass) + "x"', "b": "@file.txt"}),
        ('D(a=["an owl, brass", "a fox"], b=2)', {"a": '["an owl, brass", "a fox"]', "b": "2"}),
        ("D()", {}),
        ('D(a="")', {"a": ""}),
        ("D(a={prompt} = + * -)", {"a": "{prompt} = + * -"}),
    ],
)
def test_options_are_text_until_their_types_are_known(text: str, options: dict[str, str]) -> None:
    assert parsed(f"C + 2*{text} + E") == (Choice("C"), Choice("D", options, 2.0), Choice("E"))


@given(st.lists(CHOICES, min_size=1, max_size=4))
def test_what_is_written_of_any_terms_gives_them_back(terms: list[Choice]) -> None:
    again = parsed(write_expression(terms))
    assert again == tuple(terms)
    assert [math.copysign(1, one.weight) for one in again] == [math.copysign(1, one.weight) for one in terms]


@given(st.text(alphabet='ab1.5*+-(),="[]: \\', max_size=20))
def test_any_text_is_read_or_told_of_with_the_place(text: str) -> None:
    terms, problems = parse_expression(text)
    assert terms or problems
    if not problems:
        assert parsed(write_expression(terms)) == terms


def test_a_mistake_is_told_with_its_place() -> None:
    assert mistakes("") == ["at the end: expected the name of a loss"]
    assert mistakes("C + ") == ["at the end: expected the name of a loss"]
    assert mistakes("C D") == ["at character 3: expected + or the end, found 'D'"]
    assert mistakes("0.1*") == ["at the end: expected the name of a loss"]
    assert mistakes("C(a)") == ["at character 3: expected KEY=VALUE, found 'a)'"]
    assert mistakes("C(a=)") == ["at character 5: expected a value, found ')'"]
    assert mistakes('C(a="b)') == ["at character 5: text in double quotes that is not as JSON has it"]
    assert mistakes("C(a=[b])") == ["at character 5: a list that is not as JSON has it"]
    (told,) = mistakes("C(a=b (c))")
    assert told.startswith("at character 7: expected a comma or")


@pytest.mark.parametrize("text", ["C@lineer", "C@lineer:1-20 + D", "C@linear:20-1"])
def test_a_schedule_that_cannot_be_read_is_a_mistake_and_no_schedule(text: str) -> None:
    terms, problems = parse_expression(text)
    assert [problem.message.partition(";")[0] for problem in problems]
    assert {term.schedule for term in terms} == {"constant"}


def test_it_is_written_as_people_write_it() -> None:
    text = 'C - 0.5*D(a=["an owl, brass", "a fox"], b="x, y")'
    assert write_expression(parsed(text)) == text


def test_every_mistake_that_leaves_the_rest_legible_is_told() -> None:
    *told, schedule = mistakes("2*C:3(a=1, a=2) + 1e999*D + E@often")
    assert told == ["C is given a twice", "C has two weights", "the weight of D is not finite"]
    assert schedule.startswith("E: expected a schedule such as")
