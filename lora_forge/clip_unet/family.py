"""What tells one family of CLIP text encoders and a UNet from another, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

UNET = "unet"
VAE = "vae"
Take = Callable[["torch.Tensor"], "torch.Tensor"]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as it is."""
    return tensor


@dataclass(frozen=True, kw_only=True)
class ClipEncoder:
    """A text encoder: the name of its tokenizer, and whether it is a `CLIPTextModelWithProjection`."""

    tokenizer: str
    projection: bool


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """A small model of a family that is made on the spot.

    dimensions: for each component, what differs from the config that ships.
    """

    name: str
    dimensions: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family.

    name, title: what `Backend.family` says, and what messages call the family.
    encoders: text encoders by component, in order.
    pipeline: the class of diffusers that makes pictures with it.
    configs: a folder as diffusers writes it, with all configs and tokenizers and no weights: what a single-file
        checkpoint lacks, and what the tiny model is made from.
    location: where a single-file checkpoint has an encoder's parameter, given the component and the canonical
        name: the key there, and how to take the parameter from that tensor. Raises ModelError if it has none.
    foreign: given the UNet's config, why that is no model of this family, or "".
    """

    name: str
    title: str
    encoders: Mapping[str, ClipEncoder]
    pipeline: str
    configs: Path
    location: Callable[[str, str], tuple[str, Take]]
    foreign: Callable[[Mapping[str, Any]], str]
    tiny: TinyModel

    @property
    def components(self) -> tuple[str, ...]:
        """All that can carry LoRA."""
        return (*self.encoders, UNET)
