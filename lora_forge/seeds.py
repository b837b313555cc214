"""Seeds: each layer has a generator of its own."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def layer_generator(seed: int, component: str, layer: str) -> torch.Generator:
    """A CPU generator seeded by the first 8 bytes of sha256(`{seed}/{component}/{canonical full path}`).

    So a layer's initial weights depend on nothing but these three.
    """
    return generator_for(f"{seed}/{component}/{layer}")


def generator_for(name: str) -> torch.Generator:
    """A CPU generator seeded by the first 8 bytes of sha256(name)."""
    import torch

    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big"))
