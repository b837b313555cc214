"""Where in a text the conditioning moves, token by token: of a run, and of any file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lora_forge.batch import ModelView


@dataclass(frozen=True)
class TokenShift:
    """How far a part of the conditioning moves at one token of a prompt.

    relative: ‖with − without‖ / ‖without‖ at this token. share: of the part's squared change; they sum to 1, or are all
    0. padding: it stands after the end of the text, where the denoiser looks too.
    """

    part: str
    encoder: str
    position: int
    text: str
    padding: bool
    relative: float
    share: float


def token_shifts(view: ModelView) -> list[list[TokenShift]]:
    """Per prompt of a view, with the bank of the moment: every token's shift, for each part that has one per token.

    Unmasked, as the pipeline encodes. A part has a row per token if it is made of one encoder's outputs and is as long
    as that encoder's tokens.
    """
    shifts: list[list[TokenShift]] = [[] for _ in range(view.prompts)]
    for group in encoder_groups(view) if view.encoders else ():
        if len(group) > 1:
            continue
        tokens = view.tokens(view.texts)[group[0]]
        texts, padding = view.backend.token_texts(group[0], tokens), (tokens.attention_mask == 0).tolist()
        before, after = (conditioning_parts(view, group, adapted=adapted) for adapted in (False, True))
        for name, part in before.items():
            if part.ndim != 3 or part.shape[1] != tokens.attention_mask.shape[1]:  # one vector for the whole text
                continue
            for prompt, row in enumerate(shifts):
                size, change = part[prompt].norm(dim=1), (after[name] - part)[prompt].norm(dim=1)
                relative = torch.where(size > 0, change / size, torch.zeros_like(change)).tolist()
                share = (change.square() / change.square().sum().clamp_min(5e-324)).tolist()
                row += [
                    TokenShift(name, group[0], position, text, *numbers)
                    for position, (text, *numbers) in enumerate(
                        zip(texts[prompt], padding[prompt], relative, share, strict=True)
                    )
                ]
    return shifts


def conditioning_parts(view: ModelView, encoders: Sequence[str], *, adapted: bool) -> dict[str, torch.Tensor]:
    """What these encoders make of a view's texts, by part, `(prompts, …)` float64 on the CPU, unmasked."""
    with torch.no_grad():
        outputs = view.outputs(view.texts, adapted=adapted, masked=False)
        parts = view.backend.conditioning({encoder: outputs[encoder] for encoder in encoders})
    return {name: tensor.cpu().double() for name, tensor in parts.items()}


def encoder_groups(view: ModelView) -> list[tuple[str, ...]]:
    """Encoders that have to run together: each alone, unless a part is made of several encoders' outputs."""
    every = view.encoders
    whole = [(name, part.shape) for name, part in conditioning_parts(view, every, adapted=False).items()]
    apart = [
        (name, part.shape) for one in every for name, part in conditioning_parts(view, [one], adapted=False).items()
    ]
    return [(one,) for one in every] if sorted(apart) == sorted(whole) else [every]
