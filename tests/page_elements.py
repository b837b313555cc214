"""A page's elements, and what a script that was run in it has noted."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any

EVIL = "<img src=x onerror=\"document.title='run'\"></script><script>document.title='run'</script>{{7*7}}"

MEASURE = """
addEventListener("load", () => {
  document.documentElement.dataset.wide = document.documentElement.scrollWidth;
  document.documentElement.dataset.back = getComputedStyle(document.body).backgroundColor;
});
"""
# What scripts note, and moving the mouse over a plot to a share of its width and height.
NOTE = """
const note = (name, value) => { document.documentElement.setAttribute("data-note-" + name, JSON.stringify(value)); };
const named = (within, kind, text) => [...within.querySelectorAll(kind)].find((one) => one.textContent === text);
const hover = (plot, across, down) => {
  const drag = plot.querySelector(".nsewdrag");
  const box = drag.getBoundingClientRect();
  for (const kind of ["mouseover", "mousemove"]) {
    drag.dispatchEvent(new MouseEvent(kind, {
      bubbles: true, clientX: box.left + across * box.width, clientY: box.top + down * box.height,
    }));
  }
};
const hovered = (plot) => [...plot.querySelectorAll(".hoverlayer text")].map((one) => one.textContent);
"""


class Elements(HTMLParser):
    """Every element of a page with its attributes, and its text without scripts.

    figures: `{title of the chart: {label of the view: figure}}`.
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.figures: dict[str, dict[str, Any]] = {}
        self._within, self._label, self._title = "", "", ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._within, self._label = tag, dict(attrs).get("data-label") or ""
        if dict(attrs).get("type") == "application/json":
            self._within = "json"

    def handle_endtag(self, tag: str) -> None:
        self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within == "figcaption":
            self._title = data
        if self._within == "json":
            self.figures.setdefault(self._title, {})[self._label] = json.loads(data)
        elif self._within not in ("script", "style"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def noted(document: str) -> dict[str, Any]:
    """What scripts noted on the document."""
    (root,) = Elements(document).all("html")
    start = "data-note-"
    return {name.removeprefix(start): json.loads(value or "") for name, value in root.items() if start in name}
