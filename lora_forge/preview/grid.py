"""Images without and with a LoRA as one labelled picture, and a small one of one of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_forge.preview.labels import Font, shortened, wrapped

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

    from lora_forge.effect.of_file import Prompt
    from lora_forge.preview.render import Picture, Preview

_PAPER, _INK, _FAINT, _RULE = "#ffffff", "#1c1e21", "#62676e", "#d5d8dc"
_LEAST = 192  # pixels: smaller images are shown larger, pixel by pixel, so that there is room for words
_TEXT_LINES = 3
_THUMBNAIL = 256  # pixels
_THUMBNAIL_BYTES = 40_000


def grid(preview: Preview) -> Image:
    """A column for each strength, and a row for each prompt and seed, under the prompt in words."""
    from PIL import Image, ImageDraw

    layout = _Layout(preview)
    image = Image.new("RGB", (layout.width, layout.height), _PAPER)
    layout.draw(image, ImageDraw.Draw(image))
    return image


def thumbnail(image: Image) -> bytes:
    """A JPEG of at most 256 pixels a side and 40,000 bytes."""
    small = image.convert("RGB")
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    for quality in (88, 75, 60, 40):
        data = io.BytesIO()
        small.save(data, "JPEG", quality=quality, optimize=True)
        if data.tell() <= _THUMBNAIL_BYTES:
            break
    return data.getvalue()


def _both(prompt: Prompt) -> str:
    return prompt.text if prompt.text_2 is None else f"{prompt.text} / {prompt.text_2}"


def _summary(preview: Preview) -> str:
    """The mean differences at the last strength, in words."""
    last = preview.differences()[-1]
    text = f"mean difference at strength {last.strength:g}: training prompt {last.training:.3g} %"
    if last.controls is not None:
        text += f", control prompts {last.controls:.3g} %"
    return text if last.ratio is None else f"{text}; ratio {last.ratio:.3g}"


class _Layout:
    """Where everything goes; from top to bottom the strengths, then for each prompt its words and its rows."""

    def __init__(self, preview: Preview) -> None:
        self.preview = preview
        width, height = preview.size
        self.times = max(1, -(-_LEAST // width))
        self.cell = (width * self.times, height * self.times)
        self.text = max(14, min(self.cell[0] // 18, 28))
        self.font, self.small = Font(self.text), Font(round(self.text * 0.85))
        self.gap = self.text // 2
        self.margin = self.text
        self.line = round(self.text * 1.35)
        self.columns = len(preview.strengths)
        self.left = self.margin + (self._seeds_width() + self.gap if len(preview.seeds) > 1 else 0)
        self.width = self.left + self.columns * (self.cell[0] + self.gap) - self.gap + self.margin
        self.prompts = [self._wrapped(f"{one.role} prompt: {_both(one)}") for one in preview.prompts]
        self.summary = self._wrapped(_summary(preview))
        row = self.cell[1] + self.line + self.gap
        blocks = [(2 * self.gap + len(words) * self.line + row * len(preview.seeds)) for words in self.prompts]
        self.height = self.margin + self.line * (1 + len(self.summary)) + sum(blocks) + self.gap + self.margin

    def _seeds_width(self) -> int:
        return max(self.small.width(f"seed {seed}") for seed in self.preview.seeds)

    def _wrapped(self, text: str) -> list[str]:
        return wrapped(text, self.font, self.width - 2 * self.margin, _TEXT_LINES)

    def draw(self, image: Image, pen: ImageDraw) -> None:
        top = self.margin
        for column, strength in enumerate(self.preview.strengths):
            label = f"strength {strength:g}" if strength else "without LoRA"
            self._centred(pen, column, top, label, self.font, _INK)
        top += self.line
        pictures = iter(self.preview.pictures)
        for words in self.prompts:
            top = self._text(pen, top, words) + self.gap
            for seed in self.preview.seeds:
                row = [next(pictures) for _ in self.preview.strengths]
                self._row(image, pen, top, seed, row)
                top += self.cell[1] + self.line + self.gap
        self._text(pen, top, self.summary)

    def _text(self, pen: ImageDraw, top: int, lines: Sequence[str]) -> int:
        """A rule and lines under it; where they end."""
        pen.line([(self.margin, top), (self.width - self.margin, top)], fill=_RULE)
        top += self.gap
        for line in lines:
            self.font.write(pen, (self.margin, top), line, _INK)
            top += self.line
        return top

    def _row(self, image: Image, pen: ImageDraw, top: int, seed: int, row: Sequence[Picture]) -> None:
        from PIL.Image import Resampling

        if len(self.preview.seeds) > 1:
            self.small.write(pen, (self.margin, top + (self.cell[1] - self.line) // 2), f"seed {seed}", _FAINT)
        for column, one in enumerate(row):
            shown = one.image.resize(self.cell, Resampling.NEAREST) if self.times > 1 else one.image
            image.paste(shown, (self._x(column), top))
            if one.strength:
                label = f"differs by {one.difference:.3g} %"
                self._centred(pen, column, top + self.cell[1] + self.gap // 4, label, self.small, _FAINT)

    def _x(self, column: int) -> int:
        return self.left + column * (self.cell[0] + self.gap)

    def _centred(self, pen: ImageDraw, column: int, top: int, label: str, font: Font, ink: str) -> None:
        label = shortened(label, font, self.cell[0])
        left = self._x(column) + (self.cell[0] - font.width(label)) // 2
        font.write(pen, (left, top), label, ink)
