"""The one JSON object of `--json`, alone on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout

import click


@contextmanager
def json_alone(as_json: bool) -> Iterator[Callable[[object], None]]:
    """A function that prints an object as JSON. If `as_json`, all else printed (by a plugin, say) goes to stderr."""
    stdout = sys.stdout

    def answer(record: object) -> None:
        text = json.dumps(record, ensure_ascii=False)
        # Half a surrogate pair, of a hostile file, is no Unicode; its escape is JSON.
        click.echo(text.encode("utf-8", "backslashreplace").decode("utf-8"), file=stdout)

    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        yield answer
