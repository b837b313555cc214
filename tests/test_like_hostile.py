"""`run --like FILE` reads files that may be anybody's: what is wrong with one is said in words, and nothing breaks."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused
from safetensors import safe_open

from lora_forge.cli.main import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a plain run."""
    path = tmp_path_factory.mktemp("made") / "owl.safetensors"
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["run", "--prompt", "an owl", "--model", "tiny_sdxl", "--iterations", "2", "-o", str(path)]) == 0
    return path


def write_header(path: Path, metadata: Any) -> Path:
    """A file without tensors that holds this metadata."""
    header = json.dumps({"__metadata__": metadata}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    return path


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "is not a safetensors file"),
        (b"a text", "is not a safetensors file"),
        (b"\xff" * 40, "is not a safetensors file"),
        ((1000).to_bytes(8, "little") + b"{}", "is not a safetensors file"),
        ((2).to_bytes(8, "little") + b"[]", "is not a safetensors file"),
        ((2).to_bytes(8, "little") + b"{}", "holds no record of a run"),
    ],
)
def test_what_is_no_file_of_ours_is_refused_in_words(capsys: Capture, content: bytes | None, words: str) -> None:
    if content is not None:
        Path("other.safetensors").write_bytes(content)
    error = refused(capsys, "run", "--like", "other.safetensors", "--dry-run")
    assert "other.safetensors" in error
    assert words in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("{", "its record of the run is damaged"),
        ("[]", "its record of the run is damaged"),
        ("null", "its record of the run is damaged"),
        ("[" * 100_000, "its record of the run is damaged"),
        ('{"format": 1}', "its record of the run is damaged"),
        ('{"format": 1, "run": {}, "versions": {}}', "its record of the run is damaged"),
        ('{"format": 2, "run": "of another age"}', "its record has format 2, this release reads 1"),
    ],
    ids=range(7),
)
def test_a_record_that_cannot_be_read_is_refused_in_words(capsys: Capture, record: str, words: str) -> None:
    write_header(Path("other.safetensors"), {"lora_forge": record})
    error = refused(capsys, "run", "--like", "other.safetensors", "--dry-run")
    assert words in error
    assert len(error.splitlines()) == 1


def test_a_folder_is_refused_in_words(capsys: Capture) -> None:
    assert "cannot be read" in refused(capsys, "run", "--like", ".", "--dry-run")


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


def outcome(metadata: Any, folder: Path) -> tuple[int, str]:
    """Exit code and stderr of a dry run like a file with this metadata; whatever else is raised comes out."""
    path = write_header(folder / "hostile.safetensors", metadata)
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        code = main(["run", "--like", str(path), "--dry-run"])
    return code, errors.getvalue()


@settings(max_examples=60, deadline=None)
@given(record=JSON)
def test_any_record_is_refused_or_carried_out_but_never_breaks(record: Any, made: Path) -> None:
    for metadata in ({"lora_forge": json.dumps(record)}, {"lora_forge": record}, record):
        code, error = outcome(metadata, made.parent)
        assert code == 2
        assert error.startswith("lora-forge: error: ")
        assert "Traceback" not in error


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_record_with_any_value_in_any_place_is_refused_or_carried_out_but_never_breaks(
    made: Path, data: st.DataObject
) -> None:
    with safe_open(made, framework="pt") as file:
        metadata = dict(file.metadata())
    record = json.loads(metadata["lora_forge"])
    part: Any = {"record": record}
    key: Any = "record"
    for _ in range(data.draw(st.integers(1, 5), label="depth")):
        inner = part[key]
        if not isinstance(inner, dict | list) or not inner:
            break
        part = inner
        key = data.draw(st.sampled_from(sorted(part) if isinstance(part, dict) else range(len(part))), label="key")
    part[key] = data.draw(JSON, label="value")
    code, error = outcome({**metadata, "lora_forge": json.dumps(record)}, made.parent)
    assert code in (0, 2)
    assert "Traceback" not in error
    assert all(line.isprintable() for line in error.splitlines()), error
