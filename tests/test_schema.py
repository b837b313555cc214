"""An options type's JSON Schema allows exactly what a run config may hold; the `jsonschema` library is the judge."""

from __future__ import annotations

import dataclasses
import enum
import json
from pathlib import Path
from typing import Any, Literal

import pytest
from distributions import pretend_site
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from lora_forge.cli.main import main
from lora_forge.options import options_as_dict, parse_options
from lora_forge.plugins import Supplied, discover
from lora_forge.schema import options_schema


class Mode(enum.Enum):
    FAST = "fast"
    SLOW = "slow"


class Level(enum.Enum):
    LOW = 1
    HIGH = 2.5


Bounds = dict[str, float]
FIELDS: list[tuple[Any, Bounds]] = [
    (bool, {}),
    (int, {}),
    (int, {"min": -2, "max": 3}),
    (float, {}),
    (float, {"above": 0}),
    (float, {"min": 0.5, "max": 2}),
    (str, {}),
    (Path, {}),
    (Literal["a", "b"], {}),
    (Literal["a", 1, True], {}),
    (Mode, {}),
    (Level, {}),
    (int | None, {"min": 0}),
    (str | None, {}),
    (Path | None, {}),
    (Mode | None, {}),
    (float | str, {"max": 1}),
    (bool | int, {"min": 2}),
    (list[int], {"min": 0}),
    (list[str] | None, {}),
    (list[Literal["a", "b"]], {}),
    (list[float | None], {"above": 0}),
    (list[list[int]], {"max": 2}),
    (list[Path], {}),
    (tuple[float, float], {"min": 0, "max": 0.999}),
    (tuple[int, str], {}),
    (tuple[Mode, ...], {}),
    (tuple[bool, ...], {}),
]

# JSON has one kind of number, so that to JSON Schema 1.0 is an integer and equals 1; a run config in TOML has two,
# and there 1.0 is none. Floats of whole value are left out for that reason, and NaN and infinity are no JSON.
FRACTIONS = st.floats(-5, 5).filter(lambda number: not number.is_integer())
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-4, 5),
    st.integers(),
    FRACTIONS,
    st.floats(allow_nan=False, allow_infinity=False).filter(lambda number: not number.is_integer()),
    st.sampled_from(["", "a", "b", "c", "fast", "slow", "FAST", "none", "true", "1", "[1]"]),
    st.text(max_size=4),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=5,
)
# Lists of one kind, which a list or tuple of that kind may well accept.
LISTS = st.one_of(
    *(
        st.lists(kind, max_size=3)
        for kind in (
            st.booleans(),
            st.integers(-4, 5),
            FRACTIONS,
            st.one_of(st.none(), FRACTIONS),
            st.sampled_from(["a", "b", "fast", "slow", ""]),
            st.lists(st.integers(-4, 5), max_size=2),
        )
    ),
    st.tuples(st.integers(-4, 5), st.text(max_size=3)).map(list),
)
# Chosen in two steps, so that the many kinds of lists leave room for the rest.
ANYTHING = st.sampled_from([SCALARS, LISTS, VALUES]).flatmap(lambda kind: kind)


def options_of(hint: Any, bounds: Bounds) -> type:
    """A dataclass with one required option."""
    return dataclasses.make_dataclass("Options", [("it", hint, dataclasses.field(metadata=bounds))])


@pytest.mark.parametrize(("hint", "bounds"), FIELDS, ids=str)
@settings(max_examples=100, deadline=None)
@given(value=ANYTHING)
def test_a_json_value_fits_the_schema_exactly_if_it_is_accepted(hint: Any, bounds: Bounds, value: Any) -> None:
    options = options_of(hint, bounds)
    schema = options_schema(options)
    Draft202012Validator.check_schema(schema)
    read, problems = parse_options(options, {"it": value}, key="x")
    why = [error.message for error in Draft202012Validator(schema).iter_errors({"it": value})]
    assert (not why) == (not problems), f"{value!r}: schema says {why}, parse_options says {problems}"
    if not problems:
        json.dumps(options_as_dict(read))
        assert Draft202012Validator(schema).is_valid(options_as_dict(read))


@pytest.mark.parametrize(
    ("hint", "bounds", "fits", "does_not"),
    [
        (bool, {}, [True, False], [0, 1, "true", None]),
        (int, {"min": 0, "max": 3}, [0, 3], [-1, 4, 0.5, True, "1"]),
        (float, {"above": 0}, [0.1, 5], [0, -0.1, False, "1"]),
        (Path, {}, ["a/b", "."], ["", 5, None]),
        (Literal["a", 1], {}, ["a", 1], ["b", True, 2, "1"]),
        (Mode, {}, ["fast", "slow"], ["FAST", "", None]),
        (int | None, {"min": 2}, [None, 2], [1, "none", True]),
        (bool | int, {"min": 2}, [True, False, 2], [1, 0]),
        (list[int], {"max": 2}, [[], [1, 2]], [[3], [1, "2"], 1, None]),
        (tuple[float, float], {"min": 0}, [[0, 0.5]], [[0.5], [0, 0, 0], [-1, 0], "0,1"]),
        (tuple[Mode, ...], {}, [[], ["fast"] * 3], [["quick"], "fast"]),
    ],
    ids=str,
)
def test_the_schema_and_the_reader_agree_on_values_chosen_by_hand(
    hint: Any, bounds: Bounds, fits: list[Any], does_not: list[Any]
) -> None:
    options = options_of(hint, bounds)
    validator = Draft202012Validator(options_schema(options))
    for value in fits:
        assert validator.is_valid({"it": value}), value
        assert parse_options(options, {"it": value}, key="x")[1] == [], value
    for value in does_not:
        assert not validator.is_valid({"it": value}), value
        assert parse_options(options, {"it": value}, key="x")[1] != [], value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Several:
    needed: int
    size: float = dataclasses.field(default=0.5, metadata={"help": "how large", "above": 0, "max": 2})
    mode: Mode = Mode.SLOW
    places: list[Path] = dataclasses.field(default_factory=lambda: [Path("here")])
    pair: tuple[int, int] = (1, 2)


@given(
    st.dictionaries(
        st.sampled_from(["needed", "size", "mode", "places", "pair", "sise"]),
        st.sampled_from([1, 0.5, "slow", ["here"], [1, 2]]),
    )
)
def test_a_table_of_options_fits_exactly_if_it_is_accepted(table: dict[str, Any]) -> None:
    fits = Draft202012Validator(options_schema(Several)).is_valid(table)
    assert fits == (not parse_options(Several, table, key="x")[1])


def test_the_schema_holds_help_bounds_defaults_and_what_is_required() -> None:
    schema = options_schema(Several)
    assert schema["required"] == ["needed"]
    assert schema["additionalProperties"] is False
    assert schema["properties"] == {
        "needed": {"type": "integer"},
        "size": {"type": "number", "exclusiveMinimum": 0, "maximum": 2, "description": "how large", "default": 0.5},
        "mode": {"enum": ["fast", "slow"], "default": "slow"},
        "places": {
            "type": "array",
            "items": {"type": "string", "format": "path", "minLength": 1},
            "default": ["here"],
        },
        "pair": {
            "type": "array",
            "prefixItems": [{"type": "integer"}] * 2,
            "minItems": 2,
            "maxItems": 2,
            "default": [1, 2],
        },
    }


BUILTINS = [one for supplied in discover().supplied.values() for one in supplied if one.is_builtin]
each_builtin = pytest.mark.parametrize("one", BUILTINS, ids=lambda one: f"{one.spec.kind}-{one.spec.name}")


@each_builtin
def test_the_schema_of_every_builtin_is_valid_and_allows_its_defaults(one: Supplied) -> None:
    schema = options_schema(one.spec.options)
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == Draft202012Validator.META_SCHEMA["$id"]
    Draft202012Validator(schema).validate({})
    Draft202012Validator(schema).validate(options_as_dict(one.spec.options()))
    for name, about in schema["properties"].items():
        assert Draft202012Validator(about).is_valid(about["default"]), name
    assert json.loads(json.dumps(schema, allow_nan=False)) == schema


@each_builtin
def test_show_prints_the_schema_of_every_builtin(one: Supplied, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["plugins", "show", one.spec.name, "--kind", one.spec.kind, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["schema"] == options_schema(one.spec.options)
    assert [option["name"] for option in shown["options"]] == list(shown["schema"]["properties"])


def test_show_prints_the_schema_of_a_strangers_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = """
    from dataclasses import dataclass, field
    from typing import Literal
    from lora_forge import LossSpec, hookimpl

    @dataclass(frozen=True)
    class Options:
        steps: int = field(metadata={"min": 1, "help": "how many"})
        kind: Literal["soft", "hard"] = "soft"

    @hookimpl
    def lora_forge_losses():
        yield LossSpec(name="mine", summary="s", options=Options, factory=len)
    """
    with pretend_site(tmp_path, monkeypatch) as site:
        site.install("stranger", source)
        assert main(["plugins", "show", "mine", "--json"]) == 0
    validator = Draft202012Validator(json.loads(capsys.readouterr().out)["schema"])
    assert validator.is_valid({"steps": 1})
    assert len(list(validator.iter_errors({"steps": 0, "kind": "sof"}))) == 2
    assert not validator.is_valid({"kind": "hard"})
