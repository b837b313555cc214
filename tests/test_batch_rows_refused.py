"""What of a job's input is refused: names of files that some system cannot have, and whole files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from batch_input import line, read

from lora_forge.errors import UsageError
from lora_forge.jobs.rows import read_rows


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(name: str, content: str | bytes, **settings: Any) -> str:
    """Why a file is refused: one line, that names it."""
    with pytest.raises(UsageError) as raised:
        read(name, content, **settings)
    told = str(raised.value)
    assert "\n" not in told
    assert name in told
    return told


@pytest.mark.parametrize(
    "name", ["owl", "my owl", "v1.5_owl-2", "Käuzchen", "猫", "x" * 120, "console", "com10", "nul_"]
)
def test_a_name_that_is_safe_everywhere_is_taken(here: Path, name: str) -> None:
    assert (line(name=name).name, line(name=name).error) == (name, None)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("", "may hold letters"),
        ("a/b", "may hold letters"),
        ("a\\b", "may hold letters"),
        ("a:b", "may hold letters"),
        ("owl*", "may hold letters"),
        ("a\nb", "may hold letters"),
        ("a\0b", "may hold letters"),
        ("🦉", "may hold letters"),
        (".owl", "may neither start nor end"),
        ("..", "may neither start nor end"),
        ("owl.", "may neither start nor end"),
        (" owl", "may neither start nor end"),
        ("owl ", "may neither start nor end"),
        ("CON", "is reserved by Windows"),
        ("nul.v1", "is reserved by Windows"),
        ("Lpt1", "is reserved by Windows"),
        ("COM²", "is reserved by Windows"),
        ("x" * 121, "is longer than 120 bytes"),
        ("猫" * 41, "is longer than 120 bytes"),
    ],
)
def test_a_name_that_some_system_cannot_have_costs_its_row(here: Path, name: str, error: str) -> None:
    found = line(name=name)
    assert found.name is None
    assert str(found.error).startswith(f"name: {error}")


def test_of_two_rows_of_one_name_the_later_is_not_used(here: Path) -> None:
    text = "prompt,name\n,owl\na,Owl\nb,oWL\nc,Straße\nd,STRASSE\ne,한국\n" + "f,\u1112\u1161\u11ab국\n"
    found = read("rows.csv", text)
    assert [bool(one.error and "an earlier row has it" in one.error) for one in found.rows] == [
        False, False, True, False, True, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("empty.txt", "", "holds no prompt; give one a line"),
        ("blank.txt", "\ufeff \n\r\n", "holds no prompt"),
        ("empty.csv", "", "holds no prompt; give one a row"),
        ("header.csv", "prompt,seed\n\n,\n", "holds no prompt; give one a row"),
        ("empty.jsonl", "\n\n", "holds no prompt"),
        ("latin.txt", "ein Käuzchen".encode("latin-1"), "is not UTF-8 text; save it as UTF-8"),
        ("wide.csv", "prompt\nan owl".encode("utf-16"), "is not UTF-8 text; it looks like UTF-16; save it as UTF-8"),
        ("none.csv", "text,note\na,b", "has no column 'prompt', it has text, note; say which holds the prompts"),
        ("none.jsonl", '{"text": "a"}\n{"note": "b"}', "has no column 'prompt', it has text, note; say which"),
        ("seeds.csv", "seed\n1\n", "has no column 'prompt', it has seed; say which"),
        ("semicolons.csv", "prompt;seed\na;1", "separate columns by commas"),
        ("tabs.csv", "prompt\tseed\na\t1", "say --format tsv"),
        ("commas.tsv", "seed,prompt\n1,a", "say --format csv"),
        ("twice.csv", "prompt,Prompt\na,b", "the columns 'prompt' and 'Prompt' are both prompt"),
        ("twice.csv", "prompt,seed,seed\na,1,2", "the columns 'seed' and 'seed' are both seed"),
        ("twice.csv", "prompt,loss.a,LOSS.a\na,1,2", "the columns 'loss.a' and 'LOSS.a' are both loss.a"),
        ("model.csv", "prompt,Model\na,sdxl_base", "the column 'Model' belongs to the whole job; give it as --model"),
        ("out.csv", "prompt,output\na,b", "the column 'output' belongs to the whole job; give it as --output-dir"),
        ("saver.csv", "prompt,saver.x\na,b", "the column 'saver.x' belongs to the whole job; give it as --saver-opt"),
        ("dtype.jsonl", '"a"\n{"prompt": "a", "dtype_out": 1}', "line 2: the column 'dtype_out' belongs to"),
        ("open.csv", 'prompt,seed\na,1\n"b,2\nc,3\n', "a quote that opens in or after line 3 is never closed"),
        ("header.csv", '"prompt"s,seed\na,1\n', "the header cannot be read: line 1"),
        ("prompts", "an owl", "say what it is with --format text, csv, tsv, jsonl"),
        ("prompts.json", "[]", "say what it is with --format"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_refused_in_one_line(
    here: Path, name: str, content: str | bytes, told: str
) -> None:
    assert told in refusal(name, content)


def test_a_column_that_is_not_there_is_refused_with_the_nearest(here: Path) -> None:
    told = refusal("rows.csv", "Caption,note\na,b", column="captoin")
    assert "has no column 'captoin'; did you mean 'Caption'?" in told
    assert "known: note, text" in refusal("rows.jsonl", '{"text": "a", "note": 1}', column="captoin")
    Path("rows.txt").write_text("an owl")
    with pytest.raises(UsageError, match="text has no columns"):
        read_rows("rows.txt", column="caption")


def test_what_is_no_file_is_refused(here: Path) -> None:
    Path("folder.csv").mkdir()
    for name, told in {
        "folder.csv": "is a folder",
        ".": "is a folder",
        "missing.csv": "does not exist",
        "missing": "does not exist",
        "s3://bucket/rows.csv": "is a URL",
        "a\0b.csv": "cannot be read",
    }.items():
        with pytest.raises(UsageError, match=told):
            read_rows(name)


def test_a_format_that_is_not_known_is_refused_with_the_nearest(here: Path) -> None:
    Path("rows.txt").write_text("an owl")
    with pytest.raises(UsageError, match="unknown format 'json'; did you mean 'jsonl'"):
        read_rows("rows.txt", format="json")
