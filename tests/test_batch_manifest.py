"""A job's record: what was written is there again, whatever stopped the job, and nobody else's is touched."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_forge.errors import OutputError
from lora_forge.jobs.manifest import Manifest
from lora_forge.output import Place, place_of

HEADER = {"model": "tiny_sdxl", "batch_size": 2}
OWL, FOX, BEE = ({"id": name, "prompt": f"ein {name} 🦉", "loss": [1.5, None]} for name in ("owl", "fox", "bee"))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(params=["a path", "a URL"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, bucket: Any) -> Place:
    """Where a job may be, on this machine and at a URL; nothing is there yet."""
    return tmp_path / "deep" / "out [1]*" if request.param == "a path" else place_of("memory://bucket/out [1]*")


def written(folder: Place) -> Manifest:
    """A job of three rows, added in two steps, and left open."""
    manifest = Manifest.open(folder)
    manifest.begin(HEADER)
    manifest.add([OWL, FOX])
    manifest.add([BEE])
    return manifest


def content(folder: Place) -> tuple[Any, dict[str, Any]]:
    with closing(Manifest.open(folder)) as manifest:
        return manifest.header, manifest.rows


def lines_of(path: Place) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_a_new_job_has_no_header_and_opening_it_makes_nothing(folder: Place) -> None:
    manifest = Manifest.open(folder)
    assert (manifest.header, manifest.rows) == (None, {})
    manifest.close()
    assert not folder.exists()


def test_what_was_written_is_there_again_and_can_be_added_to(folder: Place) -> None:
    with closing(written(folder)) as manifest:
        assert manifest.header == {"format": 1, **HEADER}
        assert manifest.rows == {"owl": OWL, "fox": FOX, "bee": BEE}
    with closing(Manifest.open(folder)) as manifest:
        assert manifest.header == {"format": 1, **HEADER}
        assert manifest.rows == {"owl": OWL, "fox": FOX, "bee": BEE}
        manifest.add([{"id": "cat"}])
    assert list(content(folder)[1]) == ["owl", "fox", "bee", "cat"]


def test_of_a_row_that_was_tried_again_the_last_line_counts(folder: Place) -> None:
    with closing(written(folder)) as manifest:
        manifest.add([{"id": "owl", "error": "no memory"}, {"id": "owl", "error": None}])
        assert manifest.rows["owl"] == {"id": "owl", "error": None}
    assert content(folder)[1] == {"owl": {"id": "owl", "error": None}, "fox": FOX, "bee": BEE}


def test_the_file_is_one_line_about_the_job_and_one_for_each_row(folder: Place) -> None:
    written(folder).close()
    assert lines_of(folder / "manifest.jsonl") == [{"format": 1, **HEADER}, OWL, FOX, BEE]
    assert "🦉" in (folder / "manifest.jsonl").read_text(encoding="utf-8")


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(), json_values), st.dictionaries(st.text(), st.dictionaries(st.text(), json_values)))
def test_any_lines_come_back(header: dict[str, Any], rows: dict[str, Any]) -> None:
    import fsspec

    system = fsspec.filesystem("memory")
    system.store.clear()
    folder = place_of("memory://bucket/any")
    lines = [{**line, "id": one} for one, line in rows.items()]
    with closing(Manifest.open(folder)) as manifest:
        manifest.begin({**header, "format": 1})
        manifest.add(lines)
    assert content(folder) == ({**header, "format": 1}, {line["id"]: line for line in lines})
    assert lines_of(folder / "manifest.jsonl") == [{**header, "format": 1}, *lines]
    system.store.clear()


def test_half_a_character_and_what_is_no_number_can_be_written(folder: Place) -> None:
    with closing(Manifest.open(folder)) as manifest:
        manifest.begin(HEADER)
        manifest.add(
            [{"id": "\ud800", "prompt": "a\udfffb", "effect": {"share": float("nan"), "norms": (1.0, float("inf"))}}]
        )
    assert content(folder)[1] == {
        "\ud800": {"id": "\ud800", "prompt": "a\udfffb", "effect": {"share": None, "norms": [1.0, None]}}
    }


def test_a_job_is_begun_once(folder: Place) -> None:
    with closing(written(folder)) as manifest, pytest.raises(OutputError, match=r"was begun in .* already"):
        manifest.begin(HEADER)
    with closing(Manifest.open(folder)) as manifest, pytest.raises(OutputError, match=r"was begun in .* already"):
        manifest.begin(HEADER)


@pytest.mark.parametrize("lost", range(1, 12))
def test_a_line_that_a_power_cut_left_half_written_is_cut_off(tmp_path: Path, lost: int) -> None:
    written(tmp_path).close()
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(path.read_bytes()[:-lost])
    left = {"owl": OWL, "fox": FOX} | ({"bee": BEE} if lost == 1 else {})  # whole but for its end
    before = path.read_bytes()
    assert content(tmp_path)[1] == left
    assert path.read_bytes() == before
    with closing(Manifest.open(tmp_path)) as manifest:
        manifest.add([{"id": "cat"}])
    assert lines_of(path) == [{"format": 1, **HEADER}, *left.values(), {"id": "cat"}]


def test_a_job_that_was_cut_off_at_any_byte_goes_on(tmp_path: Path) -> None:
    written(tmp_path).close()
    path = tmp_path / "manifest.jsonl"
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with closing(Manifest.open(tmp_path)) as manifest:
            known = list(manifest.rows)
            assert known == ["owl", "fox", "bee"][: len(known)]
            if manifest.header is None:
                manifest.begin(HEADER)
            manifest.add([line for line in (OWL, FOX, BEE) if line["id"] not in known])
        assert path.read_bytes().rstrip() == whole.rstrip()


def test_zeros_that_a_power_cut_left_are_cut_off(tmp_path: Path) -> None:
    written(tmp_path).close()
    path = tmp_path / "manifest.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(5000))
    with closing(Manifest.open(tmp_path)) as manifest:
        manifest.add([OWL])
    assert path.read_bytes().startswith(whole + b'{"id": "owl"')


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"format": 1}\n{"id": "owl"}\n{"id": "fo\n{"id": "bee"}\n', "line 3, is not JSON"),
        ('{"format": 1}\n{"id": "owl"}\n{"id": "fo\n', "line 3, is not JSON"),
        ('{"format": 1}\n{"id": "\udc80"}\n{"id": "bee"}\n', "line 2, is not JSON"),
        ('{"format": 1}\n\n', "line 2, is not JSON"),
        ('{"format": 1}\n' + "[" * 100_000 + "\n", "line 2, is not JSON"),
        ('{"format": 1}\n["owl"]\n', "line 2, is no JSON object"),
        ('{"format": 1}\n{"prompt": "an owl"}\n', "line 2, has no id"),
        ('{"format": 1}\n{"id": 7}\n', "line 2, has no id"),
        ('{"format": 2}\n', "line 1, has format 2, and this lora-forge reads format 1"),
        ('{"format": true}\n', "line 1, is not about a job"),
        ('{"id": "owl"}\n', "line 1, is not about a job"),
        ("# notes\n", "line 1, is not JSON"),
    ],
)
def test_what_is_no_manifest_is_refused_and_left_alone(folder: Place, text: str, told: str) -> None:
    folder.mkdir(parents=True)
    path = folder / "manifest.jsonl"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    for _ in range(2):  # nobody holds it afterwards
        with pytest.raises(OutputError, match=told) as raised:
            Manifest.open(folder)
        assert "manifest.jsonl" in str(raised.value)
        assert "\n" not in str(raised.value)
    assert path.read_bytes() == text.encode("utf-8", "surrogateescape")


def test_a_second_job_in_the_folder_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    manifest = written(tmp_path)
    with pytest.raises(OutputError, match="another job is at work in"):
        Manifest.open(tmp_path)
    manifest.close()
    manifest.close()
    assert content(tmp_path)[1] == {"owl": OWL, "fox": FOX, "bee": BEE}


def test_of_two_jobs_that_find_nothing_the_first_to_begin_has_the_folder(tmp_path: Path) -> None:
    with closing(Manifest.open(tmp_path)) as first, closing(Manifest.open(tmp_path)) as second:
        first.begin(HEADER)
        with pytest.raises(OutputError, match="another job is at work in"):
            second.begin({"other": True})
    assert content(tmp_path)[0] == {"format": 1, **HEADER}


def test_a_job_on_a_file_system_without_locks_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    written(tmp_path).close()
    assert content(tmp_path)[1] == {"owl": OWL, "fox": FOX, "bee": BEE}


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_a_killed_job_holds_nothing_and_has_kept_every_line(tmp_path: Path) -> None:
    script = """
import sys, pathlib
from lora_forge.jobs.manifest import Manifest
manifest = Manifest.open(pathlib.Path(sys.argv[1]))
manifest.begin({})
for number in range(10**9):
    manifest.add([{"id": str(number)}])
    print(number, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        for _ in range(50):
            last = int(job.stdout.readline())
        job.send_signal(signal.SIGKILL)
    _, rows = content(tmp_path)
    assert len(rows) > last
    assert list(rows) == [str(number) for number in range(len(rows))]


def test_a_disk_that_is_full_is_told_and_costs_no_line_that_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    with closing(written(tmp_path)) as manifest:
        with monkeypatch.context() as patch:

            def full(file: int, data: bytes) -> int:
                if len(data) < 20:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return write(file, bytes(data)[:15])

            patch.setattr(os, "write", full)
            with pytest.raises(OutputError, match="cannot be written: No space left on device"):
                manifest.add([{"id": "cat"}, {"id": "dog"}])
        assert list(manifest.rows) == ["owl", "fox", "bee"]
        manifest.add([{"id": "dog"}])
    assert lines_of(tmp_path / "manifest.jsonl") == [{"format": 1, **HEADER}, OWL, FOX, BEE, {"id": "dog"}]


def test_a_folder_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with closing(Manifest.open(tmp_path / "other")) as manifest:
        (tmp_path / "other").write_text("")
        with pytest.raises(OutputError, match="cannot be written: File exists"):
            manifest.begin(HEADER)
    (tmp_path / "manifest.jsonl").mkdir()
    with pytest.raises(OutputError, match="cannot be read: Is a directory"):
        Manifest.open(tmp_path)


def test_at_a_url_every_step_is_an_object_and_their_numbers_go_on(bucket: Any) -> None:
    folder = place_of("memory://bucket/out")
    manifest = written(folder)
    manifest.add([])
    assert sorted(bucket.find("/bucket")) == [f"/bucket/out/manifest/00000{number}.jsonl" for number in (1, 2, 3)]
    with closing(Manifest.open(folder)) as again:  # the first was killed
        again.add([OWL])
    assert lines_of(folder / "manifest" / "000002.jsonl") == [OWL, FOX]
    assert lines_of(folder / "manifest" / "000004.jsonl") == [OWL]
    assert lines_of(folder / "manifest.jsonl") == [{"format": 1, **HEADER}, OWL, FOX, BEE]


def test_at_a_url_parts_are_read_by_their_number_and_nothing_beside_them(bucket: Any) -> None:
    folder = place_of("memory://bucket/out")
    with closing(Manifest.open(folder)) as manifest:
        manifest.begin(HEADER)
        for number in range(2500):
            manifest.add([{"id": "owl", "try": number}, {"id": str(number)}])
    bucket.pipe_file("/bucket/out/manifest/notes.jsonl", b"not ours")
    bucket.mv("/bucket/out/manifest/002501.jsonl", "/bucket/out/manifest/1002501.jsonl")
    (folder / "manifest.jsonl").write_text("nobody reads this\n")
    with closing(Manifest.open(folder)) as manifest:
        assert manifest.rows["owl"]["try"] == 2499
        assert len(manifest.rows) == 2501
        manifest.add([{"id": "last"}])
    assert bucket.exists("/bucket/out/manifest/1002502.jsonl")


def test_at_a_url_a_part_that_an_upload_left_half_written_loses_that_half_alone(bucket: Any) -> None:
    folder = place_of("memory://bucket/out")
    written(folder)
    path = "/bucket/out/manifest/000002.jsonl"
    bucket.pipe_file(path, bucket.cat_file(path)[:-5])
    assert list(content(folder)[1]) == ["owl", "bee"]


def test_at_a_url_the_whole_is_read_where_the_parts_are_gone_and_is_kept(bucket: Any) -> None:
    folder = place_of("memory://bucket/out")
    written(folder).close()
    bucket.rm("/bucket/out/manifest", recursive=True)
    with closing(Manifest.open(folder)) as manifest:
        manifest.add([{"id": "cat"}])
    assert lines_of(folder / "manifest" / "000001.jsonl") == [{"format": 1, **HEADER}, OWL, FOX, BEE, {"id": "cat"}]
    assert list(content(folder)[1]) == ["owl", "fox", "bee", "cat"]


def refusing(*_: Any, **__: Any) -> Any:
    raise PermissionError("you may not do this here")


@pytest.mark.parametrize(
    ("method", "step", "told"),
    [
        ("ls", lambda folder: Manifest.open(folder), "cannot be read"),
        ("cat_file", lambda folder: Manifest.open(folder), "cannot be read"),
        ("pipe_file", lambda folder: Manifest.open(folder).add([OWL]), "cannot be written"),
        ("open", lambda folder: Manifest.open(folder).close(), "cannot be written"),
    ],
)
def test_what_a_store_refuses_is_told_in_words(
    bucket: Any, monkeypatch: pytest.MonkeyPatch, method: str, step: Callable[[Place], Any], told: str
) -> None:
    folder = place_of("memory://bucket/out")
    written(folder)
    if method == "open":  # what reads is another method
        monkeypatch.setattr(type(bucket), "cat_file", lambda self, path, *_, **__: self.store[path].getvalue())
    monkeypatch.setattr(type(bucket), method, refusing)
    with pytest.raises(OutputError, match=rf"'memory://bucket/out' {told}: you may not do this here"):
        step(folder)


def test_a_store_with_real_folders_gets_the_one_for_the_parts(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe_file = type(bucket).pipe_file

    def strict(self: Any, path: str, value: bytes, **settings: Any) -> None:
        if not self.isdir(path.rpartition("/")[0]):
            raise FileNotFoundError(path)
        pipe_file(self, path, value, **settings)

    monkeypatch.setattr(type(bucket), "pipe_file", strict)
    folder = place_of("memory://bucket/out")
    written(folder).close()
    assert list(content(folder)[1]) == ["owl", "fox", "bee"]
