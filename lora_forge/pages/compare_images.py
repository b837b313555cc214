"""Pictures of a comparison, made small enough to travel within its page."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from lora_forge.comparison.results import Results, Row
from lora_forge.inspection.report import shortened

_MOST = 60
_WIDEST = 640  # pixels


@dataclass(frozen=True)
class Picture:
    """caption: whose it is. data: a JPEG, in base64."""

    caption: str
    data: str


def images_of(results: Results, folder: Path | None) -> list[Picture]:
    """The pictures that the rows name, prompt by prompt; those that are not there, or no pictures, are passed over."""
    if folder is None:
        return []
    named = [(row, row.measured.image) for row in results.rows if row.measured and row.measured.image]
    prompts = list(dict.fromkeys(row.prompt for row, _ in named))
    named.sort(key=lambda one: prompts.index(one[0].prompt))
    pictures = [_picture(row, folder / image, folder) for row, image in named[:_MOST]]
    return [picture for picture in pictures if picture is not None]


def _picture(row: Row, path: Path, folder: Path) -> Picture | None:
    """Nothing outside the folder is looked at, whatever a file of results says."""
    path = path.resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        return None
    data = _small(path)
    caption = f"{shortened(row.objective)} · {shortened(row.prompt)} · seed {row.seed}"
    return None if data is None else Picture(caption, base64.b64encode(data).decode("ascii"))


def _small(path: Path) -> bytes | None:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.thumbnail((_WIDEST, 10 * _WIDEST))
            made = BytesIO()
            image.convert("RGB").save(made, "JPEG", quality=85)
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    return made.getvalue()
