"""The effect: what LoRA weights measurably changed, per component and in what the denoiser is conditioned on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lora_forge.bank import Bank
from lora_forge.batch import ModelView
from lora_forge.contracts import LayerKey


@dataclass(frozen=True)
class ComponentEffect:
    """What happened to one component.

    delta_norm: ‖ΔW‖, Frobenius, over all its layers. inert: how many layers the objective cannot reach.
    largest_relative_change: max over layers of ‖ΔW‖ / ‖W‖; None where the frozen weights were not loaded.
    """

    component: str
    layers: int
    inert: int
    delta_norm: float
    largest_relative_change: float | None
    largest_layer: str | None


@dataclass(frozen=True)
class Shift:
    """How far a tensor moved: ‖θ − 0‖ / ‖0‖, and the cosine between the two."""

    name: str
    relative: float
    cosine: float


@dataclass(frozen=True)
class Effect:
    """Per component, and per part of the conditioning; `conditioning_shift` is that of all parts together.

    Only encoders in use are compared: one without target layers does not move. Without any, `shifts` is
    empty and `conditioning_shift` None.
    """

    components: tuple[ComponentEffect, ...]
    shifts: tuple[Shift, ...]
    conditioning_shift: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_effect(bank: Bank, view: ModelView, reached: Collection[LayerKey], loaded: Collection[str]) -> list[Effect]:
    """One `Effect` per prompt of the bank. The adapted and frozen models run unmasked, as the pipeline does."""
    components = _component_effects(bank, view, reached, loaded)
    shifts = conditioning_shifts(view)
    return [
        Effect(components[prompt], tuple(shifts[prompt][1:]), shifts[prompt][0].relative if shifts[prompt] else None)
        for prompt in range(bank.prompts)
    ]


def conditioning_shifts(view: ModelView) -> list[list[Shift]]:
    """Per prompt: the shift of all parts of the conditioning together, then of each part."""
    if not view.encoders:
        return [[] for _ in range(view.prompts)]
    with torch.no_grad():
        before = _flat(view.backend.conditioning(view.outputs(view.texts, adapted=False, masked=False)))
        after = _flat(view.backend.conditioning(view.outputs(view.texts, adapted=True, masked=False)))
    parts = ["conditioning", *before]
    before["conditioning"] = torch.cat(list(before.values()), dim=1)
    after["conditioning"] = torch.cat(list(after.values()), dim=1)
    return [
        [_shift(name, before[name][prompt], after[name][prompt]) for name in parts] for prompt in range(view.prompts)
    ]


def _flat(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu().double().flatten(1) for name, tensor in parts.items()}


def _shift(name: str, before: torch.Tensor, after: torch.Tensor) -> Shift:
    size = before.norm()
    relative = (after - before).norm() / size if size > 0 else torch.zeros(())
    cosine = torch.nn.functional.cosine_similarity(before, after, dim=0)
    return Shift(name, float(relative), float(cosine))


def _component_effects(
    bank: Bank, view: ModelView, reached: Collection[LayerKey], loaded: Collection[str]
) -> list[tuple[ComponentEffect, ...]]:
    norms = bank.delta_norms()
    # Of the run's own components only: what an earlier run of the session left loaded must not show.
    base = {key: view.backend.weight_norm(*key) if key[0] in loaded else None for key in norms}
    components = list(dict.fromkeys(component for component, _ in norms))
    effects = []
    for prompt in range(bank.prompts):
        rows = []
        for component in components:
            keys = [key for key in norms if key[0] == component]
            ratios = {key: float(norms[key][prompt]) / size for key in keys if (size := base[key])}
            largest = max(ratios, key=lambda key: ratios[key]) if ratios else None
            rows.append(
                ComponentEffect(
                    component=component,
                    layers=len(keys),
                    inert=sum(key not in reached for key in keys),
                    delta_norm=float(torch.stack([norms[key][prompt] for key in keys]).norm()),
                    largest_relative_change=ratios[largest] if largest else None,
                    largest_layer=largest[1] if largest and ratios[largest] > 0 else None,
                )
            )
        effects.append(tuple(rows))
    return effects
