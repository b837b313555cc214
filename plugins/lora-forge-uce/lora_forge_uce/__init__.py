"""Unified Concept Editing for lora-forge: the cross-attention's keys and values, computed in closed form."""

from __future__ import annotations

from collections.abc import Iterator

__lora_forge_api__ = 1

from lora_forge import LossSpec, hookimpl
from lora_forge_uce.options import Options


@hookimpl
def lora_forge_losses() -> Iterator[LossSpec]:
    yield LossSpec(
        name="uce",
        summary="has the UNet read another text in this prompt: closed form of cross-attention's keys and values",
        options=Options,
        needs={"text", "noise_prediction"},
        formula=(
            "mean over to_k and to_v of cross-attention of 1/out · (mean_p ‖W c_p − W0 c*_p‖² "
            "+ preserve_weight · mean_j ‖W c_j − W0 c_j‖² + ridge · ‖W − W0‖²)"
        ),
        source="Gandikota et al., Unified Concept Editing in Diffusion Models (arXiv:2308.14761)",
        closed_form=True,
        factory="lora_forge_uce.uce:Uce",
    )
