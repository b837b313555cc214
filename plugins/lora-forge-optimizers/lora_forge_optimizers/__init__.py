"""Optimizers for lora-forge, by the names people ask for, each from its own library.

This module imports none of these libraries: the factories, named as strings, do.
"""

from __future__ import annotations

from collections.abc import Iterator

__lora_forge_api__ = 1

from lora_forge import OptimizerSpec, hookimpl
from lora_forge_optimizers.options import (
    AdafactorOptions,
    AdamW8bitOptions,
    LionOptions,
    ProdigyOptions,
    ScheduleFreeAdamWOptions,
)


@hookimpl
def lora_forge_optimizers() -> Iterator[OptimizerSpec]:
    """All five. Where `elementwise` is not set, each prompt trains alone, by an instance of its own."""
    yield OptimizerSpec(
        name="prodigy",
        summary="finds its own learning rate: Prodigy (arXiv:2306.06101), from prodigyopt",
        options=ProdigyOptions,
        factory="lora_forge_optimizers.factories:prodigy",
    )
    yield OptimizerSpec(
        name="lion",
        summary="steps by the sign of the momentum: Lion (arXiv:2302.06675), from lion-pytorch",
        options=LionOptions,
        factory="lora_forge_optimizers.factories:lion",
        elementwise=True,
    )
    yield OptimizerSpec(
        name="adafactor",
        summary="keeps rows and columns of Adam's second moment: Adafactor (arXiv:1804.04235), from transformers",
        options=AdafactorOptions,
        factory="lora_forge_optimizers.factories:adafactor",
    )
    yield OptimizerSpec(
        name="adamw8bit",
        summary="AdamW with its state in 8 bits, blockwise (arXiv:2110.02861), from bitsandbytes",
        options=AdamW8bitOptions,
        factory="lora_forge_optimizers.factories:adamw8bit",
    )
    yield OptimizerSpec(
        name="schedule_free_adamw",
        summary="averages its weights where others lower the learning rate (arXiv:2405.15682), from schedulefree",
        options=ScheduleFreeAdamWOptions,
        factory="lora_forge_optimizers.factories:schedule_free_adamw",
        elementwise=True,
    )
