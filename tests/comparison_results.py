"""Results of comparisons that nobody made, for tests of what is read from them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_forge.comparison.results import (
    Change,
    Cross,
    Header,
    Measured,
    Objective,
    RandomControl,
    Results,
    Row,
    Specificity,
)

REACH = {"text_encoder": (20, 24), "text_encoder_2": (24, 24), "unet": (0, 116)}
INERT = (*(f"text_encoder.layers.1.{name}" for name in ("q", "k", "v", "o")), "unet.down_blocks.0.to_q")


def header(names: Sequence[str], prompts: int, seeds: int) -> Header:
    return Header(
        model="tiny_sdxl",
        base_model="tiny_sdxl",
        objectives=tuple(Objective(name, name, ("text",), REACH, INERT) for name in names),
        prompts=prompts,
        seeds=tuple(range(seeds)),
        iterations=20,
        seconds=None,
        controls=("a red bus", "two chairs"),
        paraphrases=("a picture of {prompt}",),
        versions={"lora-forge": "0.1.0", "torch": "2.13.0"},
        threads=1,
        settings={"optimizer": {"name": "adamw"}},
    )


def specificity(own: float, controls: float) -> Specificity:
    ratio = own / controls if controls else None
    return Specificity(own, 0.8 * own, controls, 0.5 * controls, ratio)


def measured(names: Sequence[str], own: str, **changes: Any) -> Measured:
    """One LoRA of plain numbers, with `changes` of its fields."""
    cross = {name: Cross(1.0, 0.5 if name == own else 0.9, 0.99) for name in names}
    plain = Measured(
        loss=Change(1.1, 0.6),
        terms={own: Change(1.0, 0.5)},
        cross=cross,
        conditioning_shift=0.2,
        shifts={"text_encoder penultimate": 0.2, "text_encoder_2 pooled": 0.1},
        specificity=specificity(0.2, 0.1),
        delta_norm=3.0,
        component_norms={"text_encoder": 2.0, "text_encoder_2": math.sqrt(5)},
        effective_rank=2.5,
        random=RandomControl(0.05, specificity(0.05, 0.05)),
        steps=tuple(1.1 - 0.025 * step for step in range(20)),
        iterations=20,
        seconds=1.5,
        seconds_per_step=0.01,
        peak_memory=300_000_000,
        file=f"{own}/0.safetensors",
        image=None,
    )
    return replace(plain, **changes)


Maker = Callable[[str, int, int], Mapping[str, Any] | str]


def results(names: Sequence[str], prompts: int, seeds: int, of: Maker = lambda name, prompt, seed: {}) -> Results:
    """Every combination. of: given the objective and the numbers of prompt and seed, fields to change, or an error."""
    rows = []
    for name in names:
        for prompt in range(prompts):
            for seed in range(seeds):
                made = of(name, prompt, seed)
                error = made if isinstance(made, str) else None
                one = None if isinstance(made, str) else measured(names, name, **made)
                rows.append(Row(name, f"prompt {prompt}", seed, error, one))
    return Results(header(names, prompts, seeds), tuple(rows))


def lifelike(names: Sequence[str], prompts: int, seeds: int) -> Results:
    """Objectives that differ as real ones do: the second a little from the first, the last not at all from chance."""

    def of(name: str, prompt: int, seed: int) -> Mapping[str, Any] | str:
        chance = random.Random(f"{name}/{prompt}/{seed}")
        place, hard = names.index(name), random.Random(prompt).uniform(0.7, 1.3)
        if name == names[2] and prompt == 1 and seed == 0:
            return "term 'third' became NaN in step 7"
        strength = 0.02 if name == names[-1] else 0.1 + 0.004 * place
        shift = hard * strength * chance.uniform(0.9, 1.1)
        noise = 0.02 * hard * chance.uniform(0.8, 1.2)
        speed, floor = 0.1 + 0.02 * place, 0.2 * hard
        steps = tuple(floor + math.exp(-speed * step) * hard * chance.uniform(0.98, 1.02) for step in range(30))
        return {
            "conditioning_shift": shift,
            "specificity": specificity(shift, noise * (1 + (name != names[-1]))),
            "random": RandomControl(
                0.02 * hard * chance.uniform(0.8, 1.2), specificity(0.02, 0.02 * chance.uniform(0.9, 1.1))
            ),
            "cross": {
                other: Cross(hard, hard * (1 - (0.5 - 0.11 * abs(place - at)) * chance.uniform(0.8, 1)), 0.98 * hard)
                for at, other in enumerate(names)
            },
            "delta_norm": (3 + place) * hard,
            "effective_rank": 2 + 0.2 * place + chance.uniform(0, 0.2),
            "seconds_per_step": 0.01 + 0.002 * place,
            "steps": steps,
        }

    return results(names, prompts, seeds, of)
