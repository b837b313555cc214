"""Losses that look through the denoiser, still without images: what it predicts, and what it attends to.

This module imports nothing heavy: the losses, named as strings, do.
"""

from __future__ import annotations

from collections.abc import Iterator

__lora_forge_api__ = 1

from lora_forge import LossSpec, hookimpl
from lora_forge_diffusion.options import (
    AttendExciteOptions,
    CfgBakeOptions,
    ConceptEraseOptions,
    ConceptSliderOptions,
    IlecoOptions,
)

_NOISE = frozenset({"text", "noise_prediction"})


@hookimpl
def lora_forge_losses() -> Iterator[LossSpec]:
    """All five. θ marks the model with the LoRA in it, 0 the frozen one; MSE is the mean over a latent."""
    yield LossSpec(
        name="ileco",
        summary="the prompt comes to mean a target, as the denoiser sees it in pure noise",
        options=IlecoOptions,
        needs=_NOISE,
        formula="MSE(ε_θ(z, t, prompt), ε_0(z, t, target)); z pure noise, t random",
        source="iLECO, hako-mikan/sd-webui-traintrain; LECO, p1atdev/LECO",
        factory="lora_forge_diffusion.prediction:ileco",
    )
    yield LossSpec(
        name="cfg_bake",
        summary="classifier-free guidance goes into the weights, so that the prompt needs none",
        options=CfgBakeOptions,
        needs=_NOISE,
        formula="MSE(ε_θ(x, t, prompt), ε_0(x, t, negative) + g · (ε_0(x, t, prompt) - ε_0(x, t, negative)))",
        source="Ho & Salimans, arXiv:2207.12598; as a student's target, Meng et al., arXiv:2210.03142",
        factory="lora_forge_diffusion.prediction:cfg_bake",
    )
    yield LossSpec(
        name="concept_slider",
        summary="a LoRA to slide: towards positive at the scale 1, towards negative at -1",
        options=ConceptSliderOptions,
        needs=_NOISE,
        formula=(
            "mean over s = ±1 of MSE(ε_sθ(x, t, target), ε_0(x, t, target) + s · g · d), d = mean over attributes of "
            "ε_0(x, t, positive) - ε_0(x, t, negative); + w · mean over anchors of MSE(ε_θ, ε_0)"
        ),
        source="Concept Sliders, Gandikota et al., arXiv:2311.12092; both scales and anchors: ostris/ai-toolkit",
        factory="lora_forge_diffusion.concepts:concept_slider",
    )
    yield LossSpec(
        name="concept_erase",
        summary="a concept is erased from the model, or made stronger in it",
        options=ConceptEraseOptions,
        needs=_NOISE,
        formula=(
            "MSE(ε_θ(x, t, concept), ε_0(x, t, neutral) ∓ g · (ε_0(x, t, concept) - ε_0(x, t, neutral))); "
            "+ w · mean over anchors of MSE(ε_θ, ε_0)"
        ),
        source="ESD, Gandikota et al., arXiv:2303.07345; LECO, p1atdev/LECO",
        factory="lora_forge_diffusion.concepts:concept_erase",
    )
    yield LossSpec(
        name="attend_excite",
        summary="every word of the prompt is attended to somewhere in the picture",
        options=AttendExciteOptions,
        needs=_NOISE | {"attention"},
        formula="max over content tokens of 1 - max over places of the smoothed cross-attention",
        source="Attend-and-Excite, Chefer et al., arXiv:2301.13826",
        factory="lora_forge_diffusion.attention:attend_excite",
    )
