"""What is in a job's folder already: files that were made, those of others, and what an interrupted job left behind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_forge.errors import LoraForgeError, OutputError
from lora_forge.files.header import read_metadata
from lora_forge.files.names import RECORD_KEY
from lora_forge.jobs.tasks import Entry, Prepared, output_of
from lora_forge.output import Place
from lora_forge.plan import Plan

_TEMPORARY = re.compile(r"\.(.{1,40})-[a-z0-9_]{8}(\.\w+)?\Z")  # as `output.appearing` names what it makes
_Rows = Mapping[str, Mapping[str, Any]]


def names_in(folder: Place) -> set[str]:
    """The names of what is in a folder; none of one that is not there. Raises OutputError."""
    try:
        return {place.name for place in folder.iterdir()} if folder.exists() else set()
    except OSError as error:
        raise OutputError(f"output {str(folder)!r} cannot be looked into: {error.strerror or error}") from error
    except Exception as error:  # of whatever package serves a URL's protocol
        raise OutputError(f"output {str(folder)!r} cannot be looked into: {' '.join(str(error).split())}") from error


def settled_in(rows: _Rows, present: Collection[str], prepared: Prepared) -> tuple[set[str], set[str]]:
    """Of a job's prompts, those whose files are all there, and those that failed: as a manifest's lines say, by id."""
    made, failed = set(), set()
    for entry in entries_of(prepared):
        line = rows.get(entry.stem)
        if line is None or line.get("run_id") != entry.run_id:  # the row of this name asks for something else now
            continue
        if line.get("error"):
            failed.add(entry.stem)
        elif line.get("files") and all(name in present for name in line["files"]):
            made.add(entry.stem)
    return made, failed


def check_strangers(folder: Place, present: Collection[str], prepared: Prepared, plan: Plan, rows: _Rows) -> None:
    """Check that the job would replace nobody's files. Raises OutputError.

    rows: the manifest's lines; what they name is the job's own, and so is a file that records the very run.
    """
    if not present:
        return
    there = []
    for entry in entries_of(prepared):
        if entry.stem in rows:
            continue
        output = output_of(plan, folder, entry.stem)
        names = [place.name for place, _ in plan.files(output)]
        if any(name in present for name in names) and not (rows and _made_before(output, entry)):
            there += [name for name in names if name in present]
    if there:
        raise OutputError(
            f"{str(folder)!r} holds {len(there)} of the files already, such as {there[0]!r}, and no manifest.jsonl "
            "that knows them; --overwrite replaces them"
        )


def _made_before(output: Place, entry: Entry) -> bool:
    """Whether a job that was killed before it could say so has made this file, or was about to."""
    if entry.run_id in entry.stem:
        return True
    if not isinstance(output, Path):
        return False
    with suppress(LoraForgeError, OSError, ValueError, KeyError, TypeError):
        run = json.loads(read_metadata(output)[RECORD_KEY])["run"]
        return bool(run["prompt"] == entry.prompt and run["seed"] == entry.seed)
    return False


def sweep(folder: Place, present: Collection[str], prepared: Prepared, plan: Plan) -> None:
    """Remove half-written files of this job's prompts, which a job that was killed could not."""
    if not isinstance(folder, Path):  # what goes to a URL is made elsewhere
        return
    hidden = [(name, *match.groups()) for name in present if (match := _TEMPORARY.match(name))]
    if not hidden:
        return
    places = [place for entry in entries_of(prepared) for place, _ in plan.files(output_of(plan, folder, entry.stem))]
    own = {(place.stem[:40], place.suffix or None) for place in places}
    for name, stem, suffix in hidden:
        if (stem, suffix) in own:
            with suppress(OSError):
                shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def entries_of(prepared: Prepared) -> Iterator[Entry]:
    """All prompts of a job."""
    for _, entries in prepared.groups:
        yield from entries
