"""Where in a model a layer is, for tables and pictures: its block, and which projection of the block it is."""

from __future__ import annotations

import re
from dataclasses import dataclass

OUTSIDE = "outside"
_UNET = re.compile(
    r"((?:down|up)_blocks\.\d+|mid_block)\.((?:attentions|resnets|downsamplers|upsamplers)\.\d+"
    r"(?:\.transformer_blocks\.\d+)?)\.(.+)\Z"
)
_ENCODER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)\Z")
_NUMBERED = re.compile(r"(.*?)[.:_](\d+)(?:\.(.+))?\Z")
_INDEX = re.compile(r"(?:unet|text_encoder):(\d{1,4})\Z")  # no path at all
_TOGETHER = 4  # layers of a text encoder in a region
_LONGEST = 80


@dataclass(frozen=True)
class Place:
    """component: `""` where the name tells none. region: a few blocks together. projection: the rest of the path."""

    component: str
    region: str
    block: str
    projection: str

    @property
    def order(self) -> tuple[object, ...]:
        """Sorts as the model is built: components, blocks by number, what is outside the blocks last."""
        return self.component == "", self.component, self.block == OUTSIDE, natural(self.block)


def place_of(component: str | None, layer: str | None, name: str) -> Place:
    """The place of a layer by its canonical path, or by its name where that is all there is."""
    where = component or ""
    path = layer or name
    if layer and (match := _UNET.match(layer)):
        region, within, projection = match.groups()
        return Place(where, region, f"{region}.{within}", projection)
    if layer and (match := _ENCODER.match(layer)) and len(match.group(1)) < 5:
        number = int(match.group(1))
        first = number - number % _TOGETHER
        return Place(where, f"layers {first}–{first + _TOGETHER - 1}", f"layers.{number}", match.group(2))
    if layer and where in ("unet", "text_encoder", "text_encoder_2"):
        return Place(where, OUTSIDE, OUTSIDE, layer[:_LONGEST])
    if layer is None and (match := _INDEX.match(name)):
        number = int(match.group(1))
        return Place(where, "numbered layers", f"{number - number % 10}–{number - number % 10 + 9}", f"+{number % 10}")
    if len(path) <= 4 * _LONGEST and (match := _NUMBERED.match(path)):
        region = match.group(1)
        return Place(where, region[:_LONGEST], f"{region}.{match.group(2)}"[:_LONGEST], (match.group(3) or "layer"))
    return Place(where, OUTSIDE, OUTSIDE, path[:_LONGEST])


def natural(text: str) -> tuple[tuple[int, str], ...]:
    """Sorts numbers within text as numbers."""
    return tuple((len(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", text))
