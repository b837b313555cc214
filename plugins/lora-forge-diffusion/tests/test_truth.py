"""Each loss on a model of a few numbers in float64: its gradient, its value by hand, how often it runs the model."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from lora_forge_diffusion.attention import attend_excite
from lora_forge_diffusion.concepts import concept_erase, concept_slider
from lora_forge_diffusion.denoising import ddim_step, ddim_timesteps, noisy_latents
from lora_forge_diffusion.options import (
    AttendExciteOptions,
    CfgBakeOptions,
    ConceptEraseOptions,
    ConceptSliderOptions,
    DenoisingOptions,
    IlecoOptions,
)
from lora_forge_diffusion.prediction import cfg_bake, ileco
from small_batch import LATENT, NUMBERS, SmallBatch, drawn, small_batch

Loss = Callable[..., torch.Tensor]
CASES: list[tuple[Loss, Any]] = [
    (ileco, IlecoOptions()),
    (ileco, IlecoOptions(target="a castle")),
    (cfg_bake, CfgBakeOptions()),
    (cfg_bake, CfgBakeOptions(guidance=1.0, negative="blurry", steps=4)),
    (concept_slider, ConceptSliderOptions(steps=4)),
    (concept_slider, ConceptSliderOptions(steps=1, polarity="positive", attributes=("man", "woman"))),
    (concept_slider, ConceptSliderOptions(steps=0, anchors=("", "a dog"), anchor_weight=0.5)),
    (concept_erase, ConceptEraseOptions(steps=4)),
    (concept_erase, ConceptEraseOptions(steps=3, action="enhance", guidance=3.0, neutral="a thing")),
    (concept_erase, ConceptEraseOptions(concept="a cat", anchors=("a dog",), anchor_weight=2.0)),
    (attend_excite, AttendExciteOptions()),
    (attend_excite, AttendExciteOptions(steps=5, resolution=2, sharpness=3.0)),
]
each = pytest.mark.parametrize(
    ("loss", "options"), CASES, ids=[f"{loss.__name__}-{i}" for i, (loss, _) in enumerate(CASES)]
)


@each
def test_its_gradient_is_that_of_finite_differences(loss: Loss, options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # The latents are drawn once: that they depend on the weights too is not differentiated, in the papers neither.
    drawn_once = functools.cache(lambda: noisy_latents(batch, batch.adapted(), options))
    if getattr(options, "steps", 0):
        monkeypatch.setattr(f"{loss.__module__}.noisy_latents", lambda *_: drawn_once())
    batch = small_batch()
    (gradient,) = torch.autograd.grad(loss(batch, options).sum(), batch.weights)
    assert gradient.abs().max() > 1e-6
    step = 1e-6
    for row in range(2):
        for column in range(NUMBERS):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    batch.weights[row, column] += sign * step
                ends.append(float(loss(batch, options).detach()[row]))
                with torch.no_grad():
                    batch.weights[row, column] -= sign * step
            assert float(gradient[row, column]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-8)


@each
def test_the_frozen_model_is_run_once_and_without_graph(loss: Loss, options: Any) -> None:
    batch = small_batch()
    loss(batch, options)
    frozen = [rows for rows, adapted in batch.calls if not adapted]
    assert len(frozen) == (0 if loss is attend_excite else 1)


@pytest.mark.parametrize(("polarity", "count"), [("both", 2), ("positive", 1)])
def test_a_slider_runs_the_adapted_model_once_for_each_scale(polarity: Literal["both", "positive"], count: int) -> None:
    batch = small_batch()
    concept_slider(batch, ConceptSliderOptions(steps=1, polarity=polarity, attributes=("man", "woman")))
    assert batch.calls == [(2 * 5, False), *[(2, True)] * count]


# By hand: one prompt, one text and one number at a time.


class ByHand:
    """What a loss computes for one of the prompts, from predictions that are asked for one by one."""

    def __init__(self, row: int, options: Any) -> None:
        self.row, self.batch = row, small_batch()
        self.latents = self.batch.randn("latents", *LATENT)
        share = 0.5 * (1 + math.erf(float(self.batch.randn("timestep")[row]) / math.sqrt(2)))
        self.alphas = self.batch.alphas_cumprod.tolist()
        steps = getattr(options, "steps", 0)
        if not steps:
            self.timestep = int(share * 100)
            return
        self.timestep, done = 99, int(share * steps)
        for number in range(1, done + 1):
            then = round(100 - number * 100 / steps) - 1
            empty, text = self.adapted(""), self.adapted(getattr(options, "concept", "{prompt}"))
            noise = empty + options.denoising_guidance * (text - empty)
            now = self.alphas[self.timestep]
            clean = (self.latents - (1 - now) ** 0.5 * noise) / now**0.5
            self.latents = (self.alphas[then] ** 0.5 * clean + (1 - self.alphas[then]) ** 0.5 * noise).detach()
            self.timestep = then

    def adapted(self, text: str) -> torch.Tensor:
        return self._predict(text, adapted=True)

    def frozen(self, text: str) -> torch.Tensor:
        return self._predict(text, adapted=False)

    def opposite(self, text: str) -> torch.Tensor:
        with self.batch.negated():
            return self.adapted(text)

    def _predict(self, text: str, *, adapted: bool) -> torch.Tensor:
        at = torch.full((2,), self.timestep)
        noise: torch.Tensor = self.batch.predict_noise(
            self.latents, at, self.batch.encode(text, adapted=adapted), adapted=adapted
        )
        return noise.detach()

    def mse(self, one: torch.Tensor, other: torch.Tensor) -> float:
        numbers = zip(one[self.row].flatten().tolist(), other[self.row].flatten().tolist(), strict=True)
        squares = [float(a - b) ** 2 for a, b in numbers]
        return sum(squares) / len(squares)


def ileco_by_hand(hand: ByHand, options: IlecoOptions) -> float:
    return hand.mse(hand.adapted("{prompt}"), hand.frozen(options.target))


def cfg_bake_by_hand(hand: ByHand, options: CfgBakeOptions) -> float:
    negative = hand.frozen(options.negative)
    return hand.mse(hand.adapted("{prompt}"), negative + options.guidance * (hand.frozen("{prompt}") - negative))


def anchored(hand: ByHand, options: Any) -> float:
    changes = [hand.mse(hand.adapted(anchor), hand.frozen(anchor)) for anchor in options.anchors]
    return float(options.anchor_weight) * sum(changes) / len(changes)


def slider_by_hand(hand: ByHand, options: ConceptSliderOptions) -> float:
    direction = torch.zeros_like(hand.latents)
    for attribute in options.attributes:
        end = f", {attribute}" if attribute else ""
        direction += hand.frozen(options.positive + end) - hand.frozen(options.negative + end)
    direction *= options.guidance / len(options.attributes)
    value = hand.mse(hand.adapted(options.target), hand.frozen(options.target) + direction)
    if options.polarity == "both":
        value += hand.mse(hand.opposite(options.target), hand.frozen(options.target) - direction)
        value /= 2
    return value + anchored(hand, options)


def erase_by_hand(hand: ByHand, options: ConceptEraseOptions) -> float:
    neutral, sign = hand.frozen(options.neutral), 1 if options.action == "enhance" else -1
    goal = neutral + sign * options.guidance * (hand.frozen(options.concept) - neutral)
    return hand.mse(hand.adapted(options.concept), goal) + anchored(hand, options)


def excite_by_hand(hand: ByHand, options: AttendExciteOptions) -> float:
    at = torch.full((2,), hand.timestep)
    maps = hand.batch.cross_attention(hand.latents, at, hand.batch.adapted(), adapted=True)
    one = maps["small"] if options.resolution == 2 else (maps["first"] + maps["second"]) / 2
    probabilities = (options.sharpness * one[hand.row, :, :, 1:]).softmax(-1).tolist()
    side, worst = len(probabilities), 0.0
    weights = {(i, j): math.exp(-(i * i + j * j) / 0.5) for i in (-1, 0, 1) for j in (-1, 0, 1)}
    total = sum(weights.values())
    for word in range((2, 3)[hand.row]):  # "an owl", "two red foxes"
        best = 0.0
        for y in range(side):
            for x in range(side):
                smooth = 0.0
                for (i, j), weight in weights.items():
                    row, column = min(max(y + i, 0), side - 1), min(max(x + j, 0), side - 1)
                    smooth += weight / total * probabilities[row][column][word]
                best = max(best, smooth)
        worst = max(worst, 1 - best)
    return worst


BY_HAND: dict[Loss, Callable[[ByHand, Any], float]] = {
    ileco: ileco_by_hand,
    cfg_bake: cfg_bake_by_hand,
    concept_slider: slider_by_hand,
    concept_erase: erase_by_hand,
    attend_excite: excite_by_hand,
}


@each
def test_its_value_is_the_formulas(loss: Loss, options: Any) -> None:
    values = loss(small_batch(), options)
    assert values.shape == (2,)
    for row in range(2):
        assert float(values[row]) == pytest.approx(BY_HAND[loss](ByHand(row, options), options), rel=1e-6)


# What follows from the formulas.


def test_guidance_of_one_is_what_the_model_does_already() -> None:
    batch = small_batch(size=0.0)
    for steps in (0, 3):
        assert cfg_bake(batch, CfgBakeOptions(guidance=1.0, steps=steps)).tolist() == [0, 0]
        assert (cfg_bake(batch, CfgBakeOptions(guidance=1.1, steps=steps)) > 0).all()
    enhance = concept_erase(batch, ConceptEraseOptions(action="enhance", guidance=1.0))
    assert enhance.tolist() == pytest.approx([0, 0], abs=1e-25)


def test_a_target_that_is_the_prompt_has_been_reached() -> None:
    assert ileco(small_batch(size=0.0), IlecoOptions(target="{prompt}")).tolist() == [0, 0]


def test_a_slider_whose_ends_change_places_is_the_same_lora_negated() -> None:
    batch = small_batch()
    there = concept_slider(batch, ConceptSliderOptions(steps=0, positive="old", negative="young"))
    back = SmallBatch(-batch.weights)
    assert torch.equal(there, concept_slider(back, ConceptSliderOptions(steps=0, positive="young", negative="old")))  # type: ignore[arg-type]


def test_erasing_and_enhancing_pull_in_opposite_directions_from_the_neutral() -> None:
    batch = small_batch(size=0.0)
    gradients = []
    actions: tuple[Literal["erase"], Literal["enhance"]] = ("erase", "enhance")
    for action in actions:
        value = concept_erase(batch, ConceptEraseOptions(action=action, concept="a cat", steps=0, guidance=2.0))
        gradients.append(torch.autograd.grad(value.sum(), batch.weights)[0][:, 3:])
    assert float((gradients[0] * gradients[1]).sum()) < 0


def test_a_prompt_without_words_has_nothing_to_attend_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("small_batch.PROMPTS", ("", "two red foxes"))
    values = attend_excite(small_batch(), AttendExciteOptions())
    assert values.requires_grad
    assert values[0] == 0
    assert values[1] > 0


# Latents


def test_denoising_moves_a_latent_along_the_line_from_its_noise_to_its_picture() -> None:
    picture, noise = drawn("picture", *LATENT), drawn("noise", *LATENT)
    alphas = torch.linspace(0.999, 0.01, 100, dtype=torch.float64)
    latents = alphas[99].sqrt() * picture + (1 - alphas[99]).sqrt() * noise
    for then in (60, 20, 0):
        now = {60: 99, 20: 60, 0: 20}[then]
        latents = ddim_step(latents, noise, alphas[now], alphas[then])
        torch.testing.assert_close(latents, alphas[then].sqrt() * picture + (1 - alphas[then]).sqrt() * noise)


def test_a_denoising_starts_at_the_last_timestep_and_is_evenly_spaced() -> None:
    assert ddim_timesteps(1000, 1).tolist() == [999]
    assert ddim_timesteps(1000, 4).tolist() == [999, 749, 499, 249]
    assert ddim_timesteps(10, 10).tolist() == list(range(9, -1, -1))
    assert ddim_timesteps(3, 7).min() == 0


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_each_prompt_has_a_timestep_of_its_own_drawn_evenly(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    many = tuple(f"prompt {number}" for number in range(600))
    monkeypatch.setattr("small_batch.PROMPTS", many)
    batch: Any = SmallBatch(torch.zeros(len(many), NUMBERS, dtype=torch.float64))
    text = batch.adapted()
    latents, timesteps = noisy_latents(batch, text, DenoisingOptions(steps=steps))
    assert latents.shape == (600, *LATENT)
    assert not latents.requires_grad
    if steps == 1:
        assert set(timesteps.tolist()) == {99}
        assert torch.equal(latents, batch.randn("latents", *LATENT))
        assert batch.calls == []
    elif steps == 3:
        counts = {at: timesteps.tolist().count(at) for at in (99, 66, 32)}
        assert sum(counts.values()) == 600
        assert min(counts.values()) > 150
        assert batch.calls == [(1200, True)] * 2
    else:
        assert int(timesteps.min()) < 5
        assert int(timesteps.max()) > 94
        assert abs(float(timesteps.double().mean()) - 49.5) < 5


def test_a_prompts_latents_do_not_depend_on_how_far_the_others_are_denoised() -> None:
    options = DenoisingOptions(steps=9)
    both, alone = small_batch(), small_batch(prompts=1)
    one, other = (noisy_latents(b, b.adapted(), options) for b in (both, alone))
    torch.testing.assert_close(one[0][:1], other[0], rtol=1e-12, atol=0)
    assert one[1][0] == other[1][0]
