"""The options of `uce`."""

from __future__ import annotations

from dataclasses import dataclass, field

from lora_forge.prompts import prompts_field

# The empty prompt is what classifier-free guidance sets a prompt against; the others are what most prompts are about.
NEUTRAL = ("", "a photo", "a drawing", "a person", "a landscape")


@dataclass(frozen=True, kw_only=True)
class Options:
    """`{prompt}` in a text stands for the prompt of the run."""

    target: str = field(
        default="{prompt}, masterpiece, best quality",
        metadata={"help": "the text whose keys and values the prompt gets"},
    )
    preserve: tuple[str, ...] = prompts_field(
        default=NEUTRAL, help="prompts that shall keep their keys and values; @FILE for a prompt a line"
    )
    preserve_weight: float = field(default=1.0, metadata={"help": "how much they count against the edit", "min": 0})
    ridge: float = field(
        default=0.01, metadata={"help": "how much the size of the change counts: λ of the paper's code", "above": 0}
    )
