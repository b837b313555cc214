"""Options of the backends; light, since a spec names them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class CheckpointOptions:
    """Options of a backend that reads single-file checkpoints."""

    config: Path | None = field(
        default=None,
        metadata={
            "help": "folder with configs and tokenizers for a single-file checkpoint, instead of those that ship"
        },
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata={
            "help": "compute the UNet's and the VAE's activations again in the backward pass: less memory, more time"
        },
    )
