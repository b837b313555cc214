"""The options of `reward`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Options:
    """`function` is a path, so that a LoRA file of somebody else's, repeated with `--like`, never has one run."""

    function: Path | None = field(
        default=None,
        metadata={
            "help": "the reward, file.py:name or package.module:name: called with pictures and prompts, gives a number "
            "for each; none: CLIP similarity"
        },
    )
    clip_model: str = field(
        default="openai/clip-vit-base-patch32", metadata={"help": "the CLIP model, by its name on the Hub"}
    )
    clip_folder: Path | None = field(
        default=None, metadata={"help": "a folder with a CLIP model, instead of one on the Hub"}
    )
    steps: int = field(default=4, metadata={"help": "steps of the sampler", "min": 1, "max": 1000})
    gradient_steps: int = field(
        default=1,
        metadata={"help": "the last steps, which the gradient goes through; memory grows with them", "min": 1},
    )
    guidance: float = field(
        default=5.0, metadata={"help": "classifier-free guidance; at 1 there is none, in half the time", "min": 1}
    )
    negative: str = field(default="", metadata={"help": "the text that guidance leads away from"})
