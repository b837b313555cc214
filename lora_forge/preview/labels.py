"""Words in a picture: of whatever script, in lines of a width, with what letters the fonts at hand have."""

from __future__ import annotations

import functools
import unicodedata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

# Pillow brings letters for English alone. For others a font of the system is taken that has them all, if there is one.
_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "LiberationSans-Regular.ttf",
    "Arial Unicode.ttf",
    "arial.ttf",
    "NotoSansCJK-Regular.ttc",
    "PingFang.ttc",
    "msyh.ttc",
)
_NO_LETTER = "\U0010ffff"  # no character, so that every font has its sign for a missing one here
_END = "..."
_LONGEST = 5000  # letters; no lines that are drawn have room for as many


class Font:
    """Letters of a size in pixels."""

    def __init__(self, size: int) -> None:
        self.size = size

    def width(self, text: str) -> int:
        """In pixels, of one line."""
        face, text = self._legible(text)
        return int(face.getlength(text) + 0.5)

    def write(self, pen: ImageDraw, place: tuple[int, int], text: str, ink: str) -> None:
        """One line, its top left corner at `place`."""
        face, text = self._legible(text)
        pen.text(place, text, fill=ink, font=face)

    def _legible(self, text: str) -> tuple[Any, str]:
        """A font that has every letter; or else the best there is, and the text with escapes where it has none."""
        faces = _faces(self.size)
        for face in faces:
            if all(_has(face, letter) for letter in set(text)):
                return face, text
        best = max(faces, key=lambda face: sum(_has(face, letter) for letter in set(text)))
        return best, "".join(letter if _has(best, letter) else _escaped(best, letter) for letter in text)


@functools.lru_cache(maxsize=8)
def _faces(size: int) -> list[Any]:
    """Pillow's own first, so that usual labels look alike everywhere."""
    from PIL import ImageFont

    faces: list[Any] = [ImageFont.load_default(size)]
    for name in _FONTS:
        try:
            faces.append(ImageFont.truetype(name, size))
        except OSError:
            continue
    return faces


@functools.lru_cache(maxsize=4096)
def _has(face: Any, letter: str) -> bool:
    return letter == " " or _drawn(face, letter) != _drawn(face, _NO_LETTER)


def _drawn(face: Any, letter: str) -> tuple[Any, bytes]:
    mask = face.getmask(letter)
    return mask.size, bytes(mask)


def _escaped(face: Any, letter: str) -> str:
    plain = unicodedata.normalize("NFKD", letter)[0]  # é without its accent
    return plain if _has(face, plain) else letter.encode("ascii", "backslashreplace").decode("ascii")


def wrapped(text: str, font: Font, width: int, most: int) -> list[str]:
    """At most `most` lines of at most `width` pixels, broken between words where that can be; the rest is cut off."""
    words = "".join(letter if letter.isprintable() else " " for letter in text[:_LONGEST]).split()
    lines: list[str] = []
    line = ""
    while words and len(lines) < most:
        word = words.pop(0)
        longer = f"{line} {word}" if line else word
        if font.width(longer) <= width:
            line = longer
        elif line:
            lines.append(line)
            line, words = "", [word, *words]
        else:  # a word, or a text of a script without spaces, that is wider than a line
            line = _fitting(word, font, width)
            words.insert(0, word[len(line) :])
    if len(lines) < most:
        return [*lines, *([line] if line else [])]
    if words or line:
        lines[-1] = shortened(f"{lines[-1]} {line}{_END}", font, width)
    return lines


def shortened(text: str, font: Font, width: int) -> str:
    """The text where it fits, else its beginning with an ellipsis."""
    if font.width(text) <= width:
        return text
    return f"{_fitting(text, font, width - font.width(_END)).rstrip()}{_END}"


def _fitting(text: str, font: Font, width: int) -> str:
    """The longest beginning that fits; at least one letter."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.width(text[:middle]) <= width else (low, middle - 1)
    return text[:low]
