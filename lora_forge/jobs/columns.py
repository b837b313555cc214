"""What the columns of a table, or the keys of a JSON object, mean to a job."""

from __future__ import annotations

import dataclasses
import difflib
from collections import Counter
from collections.abc import Sequence

from lora_forge.config.run import RunConfig
from lora_forge.errors import UsageError, quoted

KINDS = ("loss", "optimizer", "initializer")  # plugins that a row may choose, and whose options it may set
SCALARS = ("iterations", "l2", "rank", "alpha", "inert", "init_from", "strength", "target_shift")
_OWN = ("prompt_2", "seed", "name", *SCALARS, *KINDS)
_JOB = {field.name for field in dataclasses.fields(RunConfig)} - {"prompt", *_OWN}
_OPTIONS = {
    "output": "--output-dir",
    "plugins": "--plugin",
    "backend_options": "--backend-opt",
    "paraphrases": "--paraphrase",
    "controls": "--control",
}


class Ambiguous(ValueError):
    """Two columns mean one thing; the message names them."""


def keys_of(names: Sequence[str], column: str | None) -> tuple[str | None, ...]:
    """What each column means: `prompt`, `prompt_2`, `seed`, `name`, a key of a run config, `loss.KEY`; None: nothing.

    column: the one that holds the prompts, by its exact name or in another case; None: the one called prompt.
    Raises Ambiguous, and UsageError for a key that belongs to the whole job.
    """
    wanted = column or "prompt"
    prompt = {wanted} if column in names else {name for name in names if _folded(name) == _folded(wanted)}
    keys = tuple("prompt" if name in prompt else _key(name) for name in names)
    twice = next((key for key, count in Counter(keys).items() if key and count > 1), None)
    if twice:
        both = " and ".join(quoted(name) for name, key in zip(names, keys, strict=True) if key == twice)
        raise Ambiguous(f"the columns {both} are both {twice}")
    return keys


def likely(name: str) -> str:
    """`" (did you mean 'x'?)"` of a column that means nothing and is called nearly as one that does, else ""."""
    kind, dot, option = name.strip().partition(".")
    close = difflib.get_close_matches(kind.lower(), KINDS if option else _OWN, n=1, cutoff=0.8)
    meant = close and (close[0] + dot + option if option else close[0])
    return f" (did you mean {meant!r}?)" if meant else ""


def _key(name: str) -> str | None:
    folded = _folded(name)
    kind, dot, option = folded.partition(".")
    if folded in _JOB or (dot and kind in ("saver", "measure", "backend_options")):
        spelling = (
            f"--{kind}-opt"
            if kind in ("saver", "measure") and dot
            else _OPTIONS.get(kind, f"--{kind.replace('_', '-')}")
        )
        raise UsageError(f"the column {quoted(name)} belongs to the whole job; give it as {spelling}")
    if kind in KINDS and option:
        return f"{kind}.{name.strip().partition('.')[2]}"  # options are spelled as they are
    return folded if folded in _OWN else None


def _folded(name: str) -> str:
    return name.strip().lower()
