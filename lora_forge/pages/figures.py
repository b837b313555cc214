"""What all charts for pages have in common: plotly's figures as JSON, drawn by the page's script in the page's colours.

Text that may come from a file is passed through `plain`: plotly reads some HTML in what it shows. A colour may be
`var(--name)`, one of the page's own, which differs between light and dark; `page.css` has them.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lora_forge.errors import printable

SERIES = tuple(f"var(--series-{number})" for number in range(1, 7))
QUIET, FAINT, LINE, PAPER = (f"var(--{name})" for name in ("quiet", "faint", "line", "paper"))
_LONGEST, _CHARACTER = 30, 6.5  # letters of a label; pixels of one


@dataclass(frozen=True)
class Chart:
    """A chart of a page: `views` has one figure as JSON for each label, of which the first is shown at first.

    about: what there is to see, for those who do not see it.
    """

    title: str
    views: Sequence[tuple[str, str]]
    about: str


def plain(text: str) -> str:
    """Text that plotly shows as it is."""
    return html.escape(text, quote=False)


def hover_text(lines: Sequence[str]) -> str:
    """What hovering shows, line by line."""
    return "<br>".join(plain(line) for line in lines if line)


def label(name: str, longest: int = _LONGEST) -> str:
    """What an axis has room for; in full it is in what hovering shows."""
    return printable(name if len(name) <= longest else f"{name[:longest]}…")


def legend_above(names: Iterable[str]) -> dict[str, Any]:
    """A legend along the upper edge, in as many rows as its names need."""
    at = {"x": 0, "xref": "container", "xanchor": "left", "y": 1, "yref": "container", "yanchor": "top"}
    width = _CHARACTER * max(map(len, names), default=0)
    return {**at, "orientation": "h", "traceorder": "normal", "entrywidth": width, "entrywidthmode": "pixels"}


def figure_json(figure: Any) -> str:
    """A plotly figure as JSON that may stand in a script element."""
    text: str = figure.to_json()
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
