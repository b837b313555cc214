"""Where in a prompt the conditioning moves: a chart per part, a bar per token."""

from __future__ import annotations

from collections.abc import Sequence

from lora_forge.effect.tokens import TokenShift
from lora_forge.inspection.report import shortened
from lora_forge.pages.bars import Bar, bars
from lora_forge.pages.figures import QUIET, SERIES, Chart, hover_text
from lora_forge.pages.tables import shown

_TEXT, _PADDING = "text", "padding"
_MOST = 512  # tokens of a chart


def token_charts(tokens: Sequence[TokenShift]) -> list[Chart]:
    """Shifts token by token of one prompt. Padding is one bar: its mean shift, and its whole share."""
    charts = []
    for part in dict.fromkeys(token.part for token in tokens):
        own = [token for token in tokens if token.part == part][:_MOST]
        text, padding = ([token for token in own if token.padding is padded] for padded in (False, True))
        views = [
            ("relative shift", _figure(text, padding)),
            ("share of its change", _figure(text, padding, share=True)),
        ]
        most = sorted(text, key=lambda token: -token.relative)[:3]
        told = ", ".join(f"{shortened(token.text)} {shown(token.relative)}" for token in most)
        charts.append(Chart(shortened(part), views, f"bars of {len(text)} tokens and of padding; most at {told}"))
    return charts


def _figure(text: Sequence[TokenShift], padding: Sequence[TokenShift], *, share: bool = False) -> str:
    rows = [
        Bar(shortened(token.text), token.share if share else token.relative, _hover(token), _TEXT) for token in text
    ]
    if padding:
        together = sum(token.share for token in padding)
        mean = sum(token.relative for token in padding) / len(padding)
        hover = hover_text(
            [
                f"{len(padding)} tokens of padding, after the end of the text",
                f"mean relative shift {shown(mean)}",
                f"together {together:.1%} of the part's squared change",
            ]
        )
        name = f"padding, {'all' if share else 'mean of'} {len(padding)}"
        rows.append(Bar(name, together if share else mean, hover, _PADDING))
    return bars(rows, {_TEXT: SERIES[0], _PADDING: QUIET}, percent=share)


def _hover(token: TokenShift) -> str:
    return hover_text(
        [
            f"{token.position}: {shortened(token.text)}",
            f"relative shift {shown(token.relative)}",
            f"{token.share:.1%} of the part's squared change",
        ]
    )
