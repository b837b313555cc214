"""The options of each loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lora_forge.prompts import prompts_field

_STEPS = (
    "of a denoising, of which a random number is done before the loss looks: 1 leaves pure noise at the last timestep, "
    "0 takes pure noise at a random one"
)


@dataclass(frozen=True, kw_only=True)
class DenoisingOptions:
    """What latents a loss looks at."""

    steps: int = field(default=0, metadata={"help": _STEPS, "min": 0, "max": 1000})
    denoising_guidance: float = field(
        default=3.0, metadata={"help": "classifier-free guidance of that denoising", "min": 0}
    )


@dataclass(frozen=True, kw_only=True)
class IlecoOptions:
    """Options of `ileco`."""

    target: str = field(
        default="{prompt}, masterpiece, best quality",
        metadata={"help": "what the prompt comes to mean; {prompt} stands for the prompt"},
    )


@dataclass(frozen=True, kw_only=True)
class CfgBakeOptions(DenoisingOptions):
    """Options of `cfg_bake`."""

    guidance: float = field(default=5.0, metadata={"help": "the guidance that goes into the weights", "min": 0})
    negative: str = field(default="", metadata={"help": "what is guided away from"})


@dataclass(frozen=True, kw_only=True)
class ConceptOptions(DenoisingOptions):
    """What `concept_slider` and `concept_erase` share."""

    steps: int = field(default=10, metadata={"help": _STEPS, "min": 0, "max": 1000})
    anchors: tuple[str, ...] = prompts_field(
        default=("",), help="prompts for which the model shall stay as it is; used where anchor_weight is not 0"
    )
    anchor_weight: float = field(default=0.0, metadata={"help": "weight of the anchors' term", "min": 0})


@dataclass(frozen=True, kw_only=True)
class ConceptSliderOptions(ConceptOptions):
    """Options of `concept_slider`."""

    target: str = field(default="{prompt}", metadata={"help": "what the slider works on"})
    positive: str = field(
        default="{prompt}, masterpiece, best quality", metadata={"help": "what the LoRA at the scale 1 pulls towards"}
    )
    negative: str = field(
        default="{prompt}, worst quality, low quality", metadata={"help": "what the LoRA at the scale -1 pulls towards"}
    )
    attributes: tuple[str, ...] = prompts_field(
        default=("",),
        help="each is appended to positive and negative, so that the slider does not change it: man, woman",
    )
    guidance: float = field(default=4.0, metadata={"help": "how far the prediction is to move", "above": 0})
    polarity: Literal["both", "positive"] = field(
        default="both", metadata={"help": "train the LoRA at the scales 1 and -1, or at 1 alone, in half the time"}
    )


@dataclass(frozen=True, kw_only=True)
class ConceptEraseOptions(ConceptOptions):
    """Options of `concept_erase`."""

    concept: str = field(default="{prompt}", metadata={"help": "what is erased, or made stronger"})
    neutral: str = field(default="", metadata={"help": "what is left of it"})
    guidance: float = field(
        default=1.0, metadata={"help": "how far beyond neutral; to enhance, 1 is what is there already", "min": 0}
    )
    action: Literal["erase", "enhance"] = field(default="erase", metadata={"help": "away from the concept, or into it"})


@dataclass(frozen=True, kw_only=True)
class AttendExciteOptions(DenoisingOptions):
    """Options of `attend_excite`."""

    steps: int = field(default=1, metadata={"help": _STEPS, "min": 0, "max": 1000})
    resolution: int = field(
        default=16, metadata={"help": "places a side; the layers whose maps are nearest to it are looked at", "min": 1}
    )
    sharpness: float = field(
        default=100.0, metadata={"help": "factor of the attention before the softmax over the words", "above": 0}
    )
