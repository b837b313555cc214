"""Images without and with the LoRAs that a run has just made, before they are written."""

from __future__ import annotations

import base64
import gc
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass

from lora_forge.contracts import LoraWeights
from lora_forge.effect.control_prompts import CONTROL_PROMPTS, drawn
from lora_forge.effect.of_file import Prompt
from lora_forge.errors import LoraForgeError, blaming
from lora_forge.files.layer_tensors import layers_of
from lora_forge.model import LoadedModel
from lora_forge.plan import IN_MEMORY, Plan, Request
from lora_forge.preview.adapter import adapter_tensors
from lora_forge.preview.grid import grid, thumbnail
from lora_forge.preview.placement import place
from lora_forge.preview.render import render_preview

_CONTROLS = 2


@dataclass(frozen=True)
class RunPreview:
    """grid: a labelled PNG. cover: metadata with a small picture of the prompt, with the LoRA at full strength."""

    grid: bytes
    cover: dict[str, str]


def preview_run(
    plan: Plan,
    requests: Sequence[Request],
    made: Sequence[LoraWeights],
    model: LoadedModel,
    notes: Sequence[list[str]],
) -> list[RunPreview | None]:
    """One for each request, by the model's pipeline; the model is let go of for that.

    made: each request's weights, float32. notes: where it is told why there is no preview; what was made is worth
    more than its picture, and is written without one.
    """
    import torch

    model.close()
    gc.collect()
    torch.cuda.empty_cache()  # what it holds does not count as free
    previews: list[RunPreview | None] = [None] * len(requests)
    for index, (request, weights) in enumerate(zip(requests, made, strict=True)):
        try:
            with blaming(f"backend {plan.backend.name!r}"):
                if not index:
                    pipeline = model.backend.pipeline()
                    if plan.base_model != IN_MEMORY:
                        place(pipeline, model.device, None)
                previews[index] = _preview(plan, request, weights, pipeline)
        except LoraForgeError as error:
            for own in notes[index:]:
                own.append(f"no preview: {error}")
            break
    return previews


def _preview(plan: Plan, request: Request, weights: LoraWeights, pipeline: object) -> RunPreview:
    controls = drawn([one for one in CONTROL_PROMPTS if one != request.prompt], _CONTROLS, request.seed)
    prompts = [Prompt("training", request.prompt, request.prompt_2), *(Prompt("control", one) for one in controls)]
    tensors = adapter_tensors(layers_of(weights, plan.alpha))
    preview = render_preview(pipeline, tensors, prompts, seeds=(request.seed,))
    picture = io.BytesIO()
    grid(preview).save(picture, "PNG")
    with_lora = next(one for one in preview.pictures if one.strength == preview.strengths[-1])
    jpeg = base64.b64encode(thumbnail(with_lora.image)).decode("ascii")
    cover = {"modelspec.thumbnail": f"data:image/jpeg;base64,{jpeg}", "ssmd_cover_images": json.dumps([jpeg])}
    return RunPreview(picture.getvalue(), cover)
