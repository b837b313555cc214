"""lora-forge-example-loss: a loss for lora-forge.

This module stays light: lora-forge imports it whenever it lists plugins, and `loss.py` only when a run uses it.
"""

__lora_forge_api__ = 1  # the version of lora-forge's plugin API this is written for

from collections.abc import Iterator
from dataclasses import dataclass, field

from lora_forge import LossSpec, hookimpl


@dataclass(frozen=True)
class Options:
    """What `--loss-opt` sets. Type, help and bounds are declared here, once."""

    towards: str = field(default="a watercolor painting", metadata={"help": "the text to lean towards"})
    keep: float = field(default=0.0, metadata={"help": "pull back to the frozen model: 1 stops halfway", "min": 0})


@hookimpl
def lora_forge_losses() -> Iterator[LossSpec]:
    yield LossSpec(
        name="lean",
        summary="leans a prompt towards another text",
        needs={"text"},
        options=Options,
        formula="(‖c - goal‖² + keep · ‖c - c₀‖²) / ‖goal - c₀‖², averaged over the parts of the conditioning c",
        source="ours",
        factory="lora_forge_example_loss.loss:lean",
    )
