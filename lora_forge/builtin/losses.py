"""Built-in losses."""

from __future__ import annotations

from collections.abc import Iterator

from lora_forge import LossSpec, hookimpl
from lora_forge.builtin.text_losses import options

_TEXT = "lora_forge.builtin.text_losses"


@hookimpl
def lora_forge_losses() -> Iterator[LossSpec]:
    yield from _of_the_prompt_alone()
    yield from _of_other_texts()
    yield from _of_one_vector()


def _of_the_prompt_alone() -> Iterator[LossSpec]:
    yield LossSpec(
        name="embedding_magnitude",
        summary="larger embeddings: the mean size of what each text encoder makes of the prompt",
        needs={"text"},
        options=options.EmbeddingMagnitudeOptions,
        formula="-mean(|last_hidden_state|), averaged over the text encoders with target layers",
        source="ours",
        capturable=True,
        factory=f"{_TEXT}.magnitude:embedding_magnitude",
    )
    yield LossSpec(
        name="conditioning_magnitude",
        summary="larger conditioning: the mean size of what the denoiser is given, held near where it was",
        needs={"text"},
        options=options.ConditioningMagnitudeOptions,
        formula="-mean(|c|) + anchor · mean((c - c₀)²) / mean(c₀²) over the prompt's tokens, averaged over the parts c "
        "of the conditioning",
        source="ours",
        capturable=True,
        tokens="content",
        factory=f"{_TEXT}.magnitude:conditioning_magnitude",
    )


def _of_other_texts() -> Iterator[LossSpec]:
    yield LossSpec(
        name="embed_write",
        summary="makes the prompt mean what another text means",
        needs={"text"},
        options=options.EmbedWriteOptions,
        formula="mean((c(prompt) - c₀(target))²), averaged over the parts c of the conditioning",
        source="sliders-conceptmod (ntc-ai), notrigger",
        capturable=True,
        factory=f"{_TEXT}.writing:embed_write",
    )
    yield LossSpec(
        name="embed_direction",
        summary="moves the prompt along the direction of a concept",
        needs={"text"},
        options=options.EmbedDirectionOptions,
        formula="mean((c - c₀ - scale · d)²) over the prompt's tokens, averaged over the parts c of the conditioning; "
        "d = mean c₀(concept) - mean c₀(the empty prompt), each over its tokens",
        source="sliders-conceptmod (ntc-ai); the curriculum is ours",
        capturable=True,
        tokens="content",
        factory=f"{_TEXT}.direction:embed_direction",
    )
    yield LossSpec(
        name="embed_preserve",
        summary="keeps neutral prompts as they are; a term beside others",
        needs={"text"},
        options=options.EmbedPreserveOptions,
        formula="mean((c(q) - c₀(q))²), averaged over neutral prompts q and the parts c of the conditioning",
        source="ours, after the anchors of Unified Concept Editing (arXiv:2308.14761)",
        capturable=True,
        factory=f"{_TEXT}.writing:embed_preserve",
    )


def _of_one_vector() -> Iterator[LossSpec]:
    yield LossSpec(
        name="pooled_align",
        summary="turns the prompt's pooled vector towards another text's",
        needs={"text"},
        options=options.PooledAlignOptions,
        formula="1 - cos(pooled(prompt), pooled₀(target))",
        source="ours, with CLIP's likeness (arXiv:2103.00020)",
        capturable=True,
        tokens="content",
        factory=f"{_TEXT}.alignment:pooled_align",
    )
    yield LossSpec(
        name="prompt_contrast",
        summary="keeps the prompt near itself or a target, and away from negatives",
        needs={"text"},
        options=options.PromptContrastOptions,
        formula="-log(exp(s⁺/τ) / (exp(s⁺/τ) + Σ exp(s⁻/τ))), s the cosine of the prompt's conditioning to the frozen "
        "one of the target (s⁺) or of a negative (s⁻), each at the last token",
        source="InfoNCE (arXiv:1807.03748)",
        capturable=True,
        tokens="content",
        factory=f"{_TEXT}.alignment:prompt_contrast",
    )
