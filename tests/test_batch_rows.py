"""The input of a job: what each format's rows ask for, and what costs a row."""

from __future__ import annotations

import csv
import io
import json
import pickle
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import pytest
from batch_input import line, read, row
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_forge.config.run import collect_run_config, read_run_config
from lora_forge.errors import UsageError
from lora_forge.jobs.rows import Row, read_rows

PARTI = Path(__file__).parent / "data" / "PartiPrompts.tsv"

# Whatever a file in UTF-8 can hold as a prompt.
prompts = st.lists(st.text(st.characters(exclude_categories=["Cs"])).filter(str.strip), min_size=1, max_size=8)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read_again(prompt_list: list[str], format: str, content: str) -> None:
    """Check that the rows are these prompts, and nothing else, with or without a BOM."""
    for encoding in ("utf-8", "utf-8-sig"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode(encoding))))
            rows = read_rows("-", format=format).rows
        assert [(one.prompt, one.error) for one in rows] == [(prompt, None) for prompt in prompt_list]


def test_text_holds_a_prompt_a_line(here: Path) -> None:
    found = read("prompts.txt", '\ufeffan owl\r\n\r\n  a fox, "red" \n\t\nein Käuzchen')
    assert found.ignored == ()
    assert found.rows == (
        Row(1, "an owl", None, None, None, {}, None),
        Row(3, 'a fox, "red"', None, None, None, {}, None),
        Row(5, "ein Käuzchen", None, None, None, {}, None),
    )


@settings(deadline=None)
@given(prompts, st.sampled_from([("\n", csv.QUOTE_ALL), ("\r\n", csv.QUOTE_MINIMAL)]))
def test_any_prompts_written_as_csv_come_back(some: list[str], style: tuple[str, Literal[0, 1]]) -> None:
    file = io.StringIO()
    csv.writer(file, lineterminator=style[0], quoting=style[1]).writerows(
        [["Prompt", "seed"], *([prompt, 7] for prompt in some)]
    )
    read_again(some, "csv", file.getvalue())


@settings(deadline=None)
@given(prompts)
def test_any_prompts_written_as_tsv_by_a_spreadsheet_come_back(some: list[str]) -> None:
    file = io.StringIO()
    csv.writer(file, dialect="excel-tab").writerows([["prompt", "seed"], *([prompt, 7] for prompt in some)])
    read_again(some, "tsv", file.getvalue())


@settings(deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\t\r\n")), min_size=1))
def test_tsv_that_is_never_quoted_comes_back_where_a_quote_opens_what_no_spreadsheet_wrote(some: list[str]) -> None:
    quoting = [f'"{text.replace(chr(34), "")}" it says' for text in some]
    read_again(quoting, "tsv", "\n".join(["prompt\tseed", *(f"{prompt}\t7" for prompt in quoting)]))


@settings(deadline=None)
@given(prompts, st.booleans(), st.booleans())
def test_any_prompts_written_as_json_lines_come_back(some: list[str], plain: bool, ascii_only: bool) -> None:
    lines = (json.dumps(one if plain else {"prompt": one}, ensure_ascii=ascii_only) for one in some)
    read_again(some, "jsonl", "\n".join(lines))


@settings(deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n")).filter(str.strip), min_size=1)
)
def test_any_prompts_written_as_text_come_back_without_the_spaces_around_them(some: list[str]) -> None:
    read_again([prompt.strip() for prompt in some], "text", "\n".join(some))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["text", "csv", "tsv", "jsonl"]))
def test_anything_else_is_refused_in_words_or_costs_its_rows(content: bytes, format: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        with suppress(UsageError):
            assert all(one.error or one.prompt.strip() for one in read_rows("-", format=format).rows)
        assert not sys.stdin.closed


def test_the_prompts_of_parti_are_read_as_they_are() -> None:
    found = read_rows(str(PARTI))
    with PARTI.open(encoding="utf-8", newline="") as file:
        lines = [line.rstrip("\r\n").split("\t") for line in file]
    assert found.ignored == ("Category", "Challenge", "Note")
    assert [one.prompt for one in found.rows] == [record[0] for record in lines[1:]]
    assert [one.number for one in found.rows] == list(range(1, 1633))
    assert not [one for one in found.rows if one.error or one.overrides or one.name or one.seed is not None]
    assert any(one.prompt.startswith('"G I G G L E"') for one in found.rows)


def test_the_rows_of_a_table_are_records_that_may_span_lines(here: Path) -> None:
    found = read("rows.csv", '\r\nprompt,seed\r\n"an owl,\r\nasleep",1\r\n\r\n,\r\na fox\r\n')
    assert [(one.number, one.prompt, one.seed) for one in found.rows] == [
        (1, "an owl,\r\nasleep", 1),
        (3, "a fox", None),
    ]


@pytest.mark.parametrize(
    ("header", "column"),
    [
        ("seed,prompt", None),
        ("seed,PROMPT ", None),
        ("prompt,caption", "caption"),
        ("Caption,caption", "caption"),
        ("prompt,Caption", "caption"),
        ("seed,name", "name"),
    ],
)
def test_the_prompts_are_in_the_column_that_is_named_or_called_prompt(
    here: Path, header: str, column: str | None
) -> None:
    (only,) = read("rows.csv", f"{header}\n1,an owl", column=column).rows
    assert (only.prompt, only.name, only.error) == ("an owl", None, None)


def test_the_prompts_are_in_the_only_column_whatever_it_is_called(here: Path) -> None:
    assert row("Caption\nan owl\n").prompt == "an owl"


def test_json_keys_are_found_as_columns_are(here: Path) -> None:
    text = '{"Caption": "an owl", "SEED": 3, "note": [1]}\n\n{"caption": "a fox", "extra": null}\n"a bee"'
    found = read("rows.ndjson", text, column="caption")
    assert [(one.number, one.prompt, one.seed) for one in found.rows] == [
        (1, "an owl", 3),
        (3, "a fox", None),
        (4, "a bee", None),
    ]
    assert found.ignored == ("note", "extra")


def test_what_a_row_asks_for_is_typed_and_fits_the_run_config(here: Path) -> None:
    header = "prompt,prompt_2,Seed,name,iterations,l2,Rank,alpha,inert,init_from,strength"
    found = row(f"{header}\nan owl,a fox, 7 , my owl ,20,1e-4,8,4,drop,owl.safetensors,0.5")
    assert (found.prompt_2, found.seed, found.name, found.error) == ("a fox", 7, "my owl", None)
    assert found.overrides == {
        "alpha": 4.0,
        "inert": "drop",
        "init_from": "owl.safetensors",
        "iterations": 20,
        "l2": 1e-4,
        "rank": 8,
        "strength": 0.5,
    }
    config = read_run_config([{"prompt": "", "target_shift": 0.1}, found.overrides])
    assert (config.iterations, config.init_from, config.target_shift) == (20, Path("owl.safetensors"), None)


def test_an_empty_cell_and_a_null_ask_for_nothing(here: Path) -> None:
    assert row("prompt,prompt_2,seed,name,iterations,loss,loss.eps\nan owl,,,, ,,") == row("prompt\nan owl")
    nothing = {"prompt_2": None, "seed": None, "name": None, "iterations": None, "loss": None, "loss.eps": None}
    assert line(**nothing, optimizer={}, initializer={"options": {}}) == line()


def plugins(layers: list[Mapping[str, Any]]) -> Any:
    """The plugins, and their options, that a run would use under these layers."""
    config, problems = collect_run_config(layers)
    assert problems == []
    return config.loss, config.optimizer, config.initializer


JOB: list[Mapping[str, Any]] = [
    {"loss": ["a:0.5", "b"], "optimizer": "sgd"},
    {"loss": {"options": {"b.eps": 1}}, "optimizer": {"options": {"lr": 1}}},
]


@pytest.mark.parametrize(
    ("given", "layers"),
    [
        ({"optimizer": "adamw"}, [{"optimizer": "adamw"}]),
        ({"optimizer": "sgd"}, [{"optimizer": "sgd"}]),
        ({"optimizer.lr": "2"}, [{"optimizer": {"options": {"lr": "2"}}}]),
        ({"optimizer.betas.x": "2"}, [{"optimizer": {"options": {"betas.x": "2"}}}]),
        ({"initializer": "zero", "initializer.Std": "2"}, [{"initializer": {"name": "zero", "options": {"Std": "2"}}}]),
        ({"loss": "c:0.1"}, [{"loss": "c:0.1"}]),
        ({"loss": "c", "loss.eps": "2"}, [{"loss": "c"}, {"loss": {"options": {"eps": "2"}}}]),
        ({"loss": "c:2", "loss.c.eps": "2"}, [{"loss": "c:2"}, {"loss": {"options": {"c.eps": "2"}}}]),
        ({"loss.b.eps": "2"}, [{"loss": {"options": {"b.eps": "2"}}}]),
        ({"loss.b.eps": "2", "Loss.a.x": "y"}, [{"loss": {"options": {"b.eps": "2", "a.x": "y"}}}]),
    ],
)
def test_a_row_s_plugins_and_options_are_those_that_the_command_line_would_choose(
    here: Path, given: dict[str, str], layers: list[Mapping[str, Any]]
) -> None:
    table = io.StringIO()
    csv.writer(table).writerows([["prompt", *given], ["an owl", *given.values()]])
    for found in (row(table.getvalue()), line(**given)):
        assert found.error is None
        assert plugins([*JOB, found.overrides]) == plugins([*JOB, *layers])


def test_json_may_give_plugins_as_a_run_config_does(here: Path) -> None:
    several: list[Any] = [{"name": "a", "weight": 0.5, "options": {"eps": 1e-6}}, "b:2"]
    assert plugins([*JOB, line(loss=several).overrides]) == plugins([*JOB, {"loss": several}])
    mixed = line(loss={"options": {"b.eps": 3, "a.x": [1]}}, **{"loss.b.eps": 2})
    assert plugins([*JOB, mixed.overrides]) == plugins([*JOB, {"loss": {"options": {"b.eps": 2, "a.x": [1]}}}])


def test_rows_that_ask_for_the_same_are_written_the_same_and_those_that_do_not_are_not(here: Path) -> None:
    same = [
        line(iterations=5, alpha=4, loss="a:0.5", **{"loss.x": 1, "loss.b": {"d": 1, "c": 2}}),
        line(loss=[{"options": {"b": {"c": 2, "d": 1}, "x": 1}, "weight": 0.5, "name": "a"}], alpha=4.0, iterations=5),
    ]
    assert len({json.dumps(one.overrides) for one in same}) == 1
    cells = (
        row("prompt,iterations,l2,alpha\na,5,1e-5,4").overrides,
        row("l2,alpha,iterations,prompt\n0.00001,4.0,05,a").overrides,
    )
    assert json.dumps(cells[0]) == json.dumps(cells[1])
    assert line(**{"loss.x": 1}).overrides["loss"]["options"]["x"] is not True
    assert json.dumps(line(**{"loss.x": True}).overrides) != json.dumps(line(**{"loss.x": 1}).overrides)


def test_rows_can_be_pickled_and_rows_that_ask_for_nothing_share_it(here: Path) -> None:
    found = read("rows.csv", "prompt,optimizer.lr\n" + "an owl,1e-3\n" * 3 + "a fox,\n" * 3)
    assert pickle.loads(pickle.dumps(found)) == found
    assert len({id(one.overrides) for one in found.rows}) == 2
    again = pickle.loads(pickle.dumps(found.rows[0].overrides))
    assert type(again["optimizer"]["options"]["lr"]) is type(found.rows[0].overrides["optimizer"]["options"]["lr"])


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"prompt": None}, "prompt: is missing"),
        ({"prompt": ""}, "prompt: is missing"),
        ({"prompt": " \n"}, "prompt: is blank"),
        ({"prompt": 3}, "prompt: expected text, got 3"),
        ({"prompt": "an \ud800 owl"}, r"prompt: is not valid Unicode: 'an \ud800 owl'"),
        ({"prompt_2": "\udfff"}, r"prompt_2: is not valid Unicode: '\udfff'"),
        ({"seed": -1}, "seed: must be ≥ 0, ≤ 9223372036854775807, got -1"),
        ({"seed": 2**63}, "seed: must be ≥ 0, ≤ 9223372036854775807, got 9223372036854775808"),
        ({"seed": "7"}, "seed: expected an integer, got '7'"),
        ({"seed": True}, "seed: expected an integer, got True"),
        ({"name": 7}, "name: expected text, got 7"),
        ({"iterations": "5"}, "iterations: expected an integer, got '5'"),
        ({"iterations": -1, "seed": 0.5}, "seed: expected an integer, got 0.5; iterations: must be ≥ 0, got -1"),
        ({"strength": 1, "target_shift": 1}, "strength: give strength or target_shift, not both"),
        ({"loss": {"weight": 2}}, "loss.name: is missing"),
        ({"loss": "a", "loss.b.eps": 2}, "loss.options.b.eps: no loss 'b' here; there is a"),
        ({"loss": []}, "loss: at least one loss is needed"),
        ({"optimizer": {"options": 3}}, "optimizer.options: expected a table, got 3"),
        ({"seed": 1, "Seed": 2}, "the columns 'seed' and 'Seed' are both seed"),
    ],
)
def test_a_row_that_cannot_be_used_says_why_and_costs_no_other(here: Path, given: dict[str, Any], error: str) -> None:
    found = read("rows.jsonl", "\n".join(map(json.dumps, ["a bee", {"prompt": "an owl", **given}, "a fox"])))
    assert [(one.number, one.error) for one in found.rows] == [(1, None), (2, error), (3, None)]
    assert found.rows[1].overrides == {}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("an owl", "is no JSON: Expecting value, column 1"),
        ("[1]", "is no row: expected an object or a string"),
        ("{", "is no JSON: Expecting property name enclosed in double quotes, column 2"),
        ('{"prompt": "a", "prompt": "b"}', "is no row: key 'prompt' appears twice"),
        ('{"prompt": "a", "l2": NaN}', "is no row: NaN is no JSON"),
        ("[" * 100_000, "is no row: nested too deeply"),
    ],
)
def test_a_line_that_is_no_row_of_json_lines_costs_itself(here: Path, text: str, error: str) -> None:
    found = read("rows.jsonl", f'"a bee"\n{text}\n"a fox"')
    assert [one.error for one in found.rows] == [None, error, None]


def test_a_cell_that_does_not_fit_says_what_the_run_config_says(here: Path) -> None:
    assert row("prompt,seed\nan owl,7.5").error == "seed: expected an integer, got '7.5'"
    assert row("prompt,inert\nan owl,dorp").error == "inert: 'dorp' is not a choice; did you mean 'drop'?"
    assert row("prompt,l2\nan owl,inf").error == "l2: expected a finite number, got 'inf'"


def test_an_error_is_short_and_one_line_whatever_was_given(here: Path) -> None:
    found = row(f'prompt,seed,name\nan owl,{"9" * 5000},"a\nb"').error
    assert found is not None
    assert "\n" not in found
    assert len(found) < 500


def test_a_record_that_cannot_be_read_costs_itself(here: Path) -> None:
    found = read("rows.csv", 'prompt,seed\na bee,1\nan owl,1,2\n"a" fox,1\n"an\nowl"s,1\na cat,1\n')
    assert [one.error for one in found.rows] == [
        None,
        "has 3 fields, the header 2",
        "line 4: ',' expected after '\"'",
        "lines 5 to 6: ',' expected after '\"'",
        None,
    ]
    assert [one.number for one in found.rows] == [1, 2, 3, 4, 5]


def test_a_format_that_is_given_wins_over_the_suffix_and_standard_input_is_text(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [one.prompt for one in read("rows.csv", "an owl, asleep\na fox", format="text").rows] == [
        "an owl, asleep",
        "a fox",
    ]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"an owl\na fox\n")))
    assert [one.prompt for one in read_rows("-").rows] == ["an owl", "a fox"]


def test_a_field_may_be_longer_than_the_csv_module_allows_and_its_limit_stays(here: Path) -> None:
    before = csv.field_size_limit()
    long = "owl " * 100_000
    assert row(f"prompt,seed\n{long},1").prompt == long
    assert csv.field_size_limit() == before
