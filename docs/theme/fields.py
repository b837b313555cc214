"""For the reference: the docstrings' `name: what it is` lines become lists, as they read in the source."""

from __future__ import annotations

import re
from typing import Any

import griffe

# A line such as `rank, alpha: the same for every layer`; it goes on in lines that are indented, or follow no full stop.
_FIELDS = re.compile(r"([a-z]\w*(?:, [a-z]\w*)*): (?=\S)")


class FieldLists(griffe.Extension):
    """Rewrites each docstring before it is rendered as Markdown."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = with_lists(obj.docstring.value)


def with_lists(text: str) -> str:
    """The text with an item for each such line; code blocks and paragraphs stay as they are."""
    lines: list[str] = []
    code = item = False
    for line in text.splitlines():
        code ^= line.lstrip().startswith("```")
        match = None if code else _FIELDS.match(line)
        if match:
            names = ", ".join(f"`{name}`" for name in match[1].split(", "))
            lines += ([] if item else [""]) + [f"- {names}: {line[match.end() :]}"]
            item = True
        elif item and (line.startswith(" ") or (line and not lines[-1].endswith("."))):
            lines.append(f"  {line.strip()}")
        else:
            lines += ["", line] if item and line else [line]
            item = False
    return "\n".join(lines)
