"""The options of each optimizer: its library's own names and defaults, except where a LoRA run needs others.

`lr` is 1e-4 as of lora-forge's `adamw`, unless the model config says another; Prodigy's is a factor of what it
finds itself, and no model config's. What else is not the library's default says so in a comment.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lora_forge.schedules import ScheduleOptions

BELOW_1 = 0.999999


@dataclass(frozen=True, kw_only=True)
class ProdigyOptions(ScheduleOptions):
    """Options of `prodigy`. Those marked as recommended are so by its authors, for diffusion models."""

    lr: float = field(
        default=1.0,
        metadata={
            "help": "factor of the learning rate it finds; leave it at 1 (a model config's learning_rate is not used)",
            "above": 0,
            "model_config": False,
        },
    )
    d_coef: float = field(
        default=1.0, metadata={"help": "factor of its estimate: what to change for larger or smaller steps", "above": 0}
    )
    # The library's default is 1e-6; its authors name up to 1e-4 where a model does not train. The estimate takes
    # dozens of steps to grow, and a run has no more: this is where `adamw` stands.
    d0: float = field(default=1e-4, metadata={"help": "the first estimate", "above": 0})
    growth_rate: float | None = field(
        default=None, metadata={"help": "how much the estimate may grow per step; none: without limit", "min": 1}
    )
    betas: tuple[float, float] = field(
        default=(0.9, 0.999), metadata={"help": "decay of the two running means", "min": 0, "max": BELOW_1}
    )
    beta3: float | None = field(
        default=None, metadata={"help": "decay of the estimate's means; none: √ of the second beta", "min": 0, "max": 1}
    )
    eps: float = field(default=1e-8, metadata={"help": "added to the denominator", "above": 0})
    # Recommended; the library's default is 0.
    weight_decay: float = field(default=0.01, metadata={"help": "weight decay", "min": 0})
    decouple: bool = field(default=True, metadata={"help": "decay weights as AdamW does, not as Adam does"})
    # Recommended; the library's default is False.
    use_bias_correction: bool = field(default=True, metadata={"help": "Adam's bias correction"})
    # Recommended; the library's default is False.
    safeguard_warmup: bool = field(
        default=True, metadata={"help": "keep `lr` out of the estimate, which warm-up would make too large"}
    )
    slice_p: int = field(
        default=1, metadata={"help": "estimate from every so many-th number, to save memory", "min": 1}
    )


@dataclass(frozen=True, kw_only=True)
class LionOptions(ScheduleOptions):
    """Options of `lion`."""

    lr: float = field(
        default=1e-4,
        metadata={"help": "what every number moves per step; 3 to 10 times smaller than AdamW's", "above": 0},
    )
    betas: tuple[float, float] = field(
        default=(0.9, 0.99), metadata={"help": "of the step, and decay of the momentum", "min": 0, "max": BELOW_1}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "weight decay; 3 to 10 times AdamW's", "min": 0})
    decoupled_weight_decay: bool = field(
        default=False, metadata={"help": "decay by `weight_decay` itself, not by `lr` times it"}
    )


@dataclass(frozen=True, kw_only=True)
class AdafactorOptions(ScheduleOptions):
    """Options of `adafactor`."""

    lr: float = field(default=1e-4, metadata={"help": "learning rate; not used with `relative_step`", "above": 0})
    # The library's default is True for both. B starts at zero, and its step would be a thousandth of `lr`.
    relative_step: bool = field(
        default=False, metadata={"help": "the paper's own learning rate, 1/√step and at most 0.01, instead of `lr`"}
    )
    scale_parameter: bool = field(
        default=False, metadata={"help": "steps in proportion to a matrix' size; the paper's with `relative_step`"}
    )
    warmup_init: bool = field(
        default=False, metadata={"help": "with `relative_step`: at most 1e-6 times the step's number"}
    )
    eps: tuple[float, float] = field(
        default=(1e-30, 1e-3), metadata={"help": "added to the squared gradient; least size of a matrix", "above": 0}
    )
    clip_threshold: float = field(default=1.0, metadata={"help": "largest root mean square of a step", "above": 0})
    decay_rate: float = field(
        default=-0.8, metadata={"help": "power of the step's number that the second moment decays by", "max": 0}
    )
    beta1: float | None = field(
        default=None, metadata={"help": "decay of a running mean of the step; none: no mean", "min": 0, "max": BELOW_1}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "weight decay", "min": 0})

    def __post_init__(self) -> None:
        if self.relative_step and (self.schedule != "constant" or self.warmup):
            raise ValueError("relative_step is a schedule of its own: leave out schedule and warmup")
        if self.warmup_init and not self.relative_step:
            raise ValueError("warmup_init needs relative_step")


@dataclass(frozen=True, kw_only=True)
class AdamW8bitOptions(ScheduleOptions):
    """Options of `adamw8bit`."""

    lr: float = field(default=1e-4, metadata={"help": "learning rate", "above": 0})
    betas: tuple[float, float] = field(
        default=(0.9, 0.999), metadata={"help": "decay of the two running means", "min": 0, "max": BELOW_1}
    )
    eps: float = field(default=1e-8, metadata={"help": "added to the denominator", "min": 0})
    weight_decay: float = field(default=0.01, metadata={"help": "decoupled weight decay", "min": 0})
    min_8bit_size: int = field(
        default=4096, metadata={"help": "matrices of fewer numbers keep their state in 32 bits", "min": 1}
    )


@dataclass(frozen=True, kw_only=True)
class ScheduleFreeAdamWOptions:
    """Options of `schedule_free_adamw`: no `schedule`, and a warm-up of its own."""

    lr: float = field(default=1e-4, metadata={"help": "learning rate; 1 to 10 times AdamW's", "above": 0})
    warmup: int = field(default=0, metadata={"help": "steps over which the learning rate rises", "min": 0})
    # The weights are read off where it trains by dividing by the first beta.
    betas: tuple[float, float] = field(
        default=(0.9, 0.999),
        metadata={
            "help": "share of the average in where it trains; decay of the second moment",
            "above": 0,
            "max": BELOW_1,
        },
    )
    eps: float = field(default=1e-8, metadata={"help": "added to the denominator", "above": 0})
    weight_decay: float = field(default=0.0, metadata={"help": "weight decay", "min": 0})
    r: float = field(default=0.0, metadata={"help": "power of the step's number that weights the average", "min": 0})
    weight_lr_power: float = field(
        default=2.0, metadata={"help": "power of the largest learning rate yet that weights the average", "min": 0}
    )
