"""Built-in losses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_forge import LossSpec, hookimpl

if TYPE_CHECKING:
    import torch

    from lora_forge.batch import Batch


def embedding_magnitude(batch: Batch) -> torch.Tensor:
    """-mean(|last_hidden_state|) of each encoder, averaged over encoders; `(prompts,)`.

    The attention mask is passed to the encoder; the mean is over all positions, padding included.
    Source: ours.
    """
    means = [output.last_hidden_state.abs().mean(dim=(1, 2)) for output in batch.adapted(masked=True).values()]
    return -sum(means[1:], means[0]) / len(means)


@hookimpl
def lora_forge_losses() -> Iterator[LossSpec]:
    yield LossSpec(
        name="embedding_magnitude",
        summary="larger embeddings: the mean size of what each text encoder makes of the prompt",
        needs={"text"},
        formula="-mean(|last_hidden_state|), averaged over the text encoders with target layers",
        source="ours",
        capturable=True,
        factory=embedding_magnitude,
    )
