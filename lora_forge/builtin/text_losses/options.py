"""What the text losses can be told; light, so that listing them imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lora_forge.prompts import prompts_field

_QUALITY = "masterpiece, best quality, highly detailed"


@dataclass(frozen=True)
class EmbeddingMagnitudeOptions:
    """Options of `embedding_magnitude`."""

    tokens: Literal["all", "content"] = field(
        default="all",
        metadata={"help": "positions of the mean: all, or the prompt's own tokens, start and end included"},
    )
    layer: Literal["last", "penultimate"] = field(
        default="last", metadata={"help": "the hidden state after the final LayerNorm, or what the last block reads"}
    )


@dataclass(frozen=True)
class ConditioningMagnitudeOptions:
    """Options of `conditioning_magnitude`."""

    anchor: float = field(
        default=1.0, metadata={"help": "weight of the relative squared distance to the frozen conditioning", "min": 0}
    )


@dataclass(frozen=True)
class EmbedWriteOptions:
    """Options of `embed_write`."""

    target: str = field(
        default=f"{{prompt}}, {_QUALITY}", metadata={"help": "what the prompt shall mean; {prompt} is the prompt"}
    )


@dataclass(frozen=True)
class EmbedDirectionOptions:
    """Options of `embed_direction`."""

    concept: str = field(default=_QUALITY, metadata={"help": "the text whose direction from the empty prompt is taken"})
    scale: float = field(default=1.0, metadata={"help": "how far along it; below 0 is away from the concept"})
    ahead: float | None = field(
        default=None,
        metadata={"help": "keep the goal this far ahead of where the prompt is by now; none: at scale", "above": 0},
    )


@dataclass(frozen=True)
class EmbedPreserveOptions:
    """Options of `embed_preserve`."""

    neutral: tuple[str, ...] = prompts_field(
        default=("", "a photo of a person", "a landscape", "a city street"), help="prompts that shall stay as they are"
    )


@dataclass(frozen=True)
class PooledAlignOptions:
    """Options of `pooled_align`."""

    target: str = field(
        default=f"{{prompt}}, {_QUALITY}", metadata={"help": "the text to point towards; {prompt} is the prompt"}
    )


@dataclass(frozen=True)
class PromptContrastOptions:
    """Options of `prompt_contrast`."""

    target: str = field(default="{prompt}", metadata={"help": "the text to stay near; {prompt} is the prompt"})
    negative: tuple[str, ...] = prompts_field(
        default=("", "blurry, low quality, deformed", "a photo of a person", "a landscape"),
        help="prompts to get away from",
    )
    temperature: float = field(default=0.1, metadata={"help": "the smaller, the more the nearest counts", "above": 0})
