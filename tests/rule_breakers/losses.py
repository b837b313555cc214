"""Losses that each break one rule."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch

from lora_forge import LossSpec
from lora_forge.batch import Batch
from lora_forge.errors import ObjectiveError
from lora_forge.seeds import generator_for
from rule_breakers import Breaker


def good(batch: Batch) -> torch.Tensor:
    """A loss that breaks none: how far the adapted outputs are from the frozen ones, and how large."""
    total = torch.zeros(batch.prompts)
    frozen = batch.frozen()
    for encoder, output in batch.adapted().items():
        far = output.penultimate_hidden_state - frozen[encoder].penultimate_hidden_state
        total = total + far.square().mean(dim=(1, 2)) - output.last_hidden_state.abs().mean(dim=(1, 2))
    return total


def denoising(batch: Batch) -> torch.Tensor:
    """A loss through the denoiser that breaks none."""
    latents = batch.randn("latents", *batch.latent_shape)
    timesteps = torch.full((batch.prompts,), 500)
    noise = batch.predict_noise(latents, timesteps, batch.adapted(), adapted=True)
    return noise.square().flatten(1).mean(dim=1)


@dataclass
class Mutable:
    size: float = 1.0


# needs


def asks_for_latents(batch: Batch) -> torch.Tensor:
    return good(batch) * batch.latent_shape[0]


def fails_to_tell(options: Any) -> Collection[str]:
    raise KeyError("mode")


# immutable


def grows_what_it_sees(batch: Batch) -> torch.Tensor:
    value = good(batch)
    for output in batch.adapted().values():
        output.pooled.mul_(2)
    return value


def shrinks_the_frozen(batch: Batch) -> torch.Tensor:
    for output in batch.frozen().values():
        output.last_hidden_state[...] = 0
    return good(batch)


def masks_tokens(batch: Batch) -> torch.Tensor:
    for tokens in batch.tokens.values():
        tokens.attention_mask.zero_()
    return good(batch)


def trains_by_itself(batch: Batch) -> torch.Tensor:
    value = good(batch)
    bank: Any = batch._view.slot.bank
    bank.parameter.data.mul_(0.5)
    return value


def counts_in_its_options(batch: Batch, options: Mutable) -> torch.Tensor:
    options.size += 1
    return good(batch)


# shape, finite, differentiable


def one_for_all(batch: Batch) -> torch.Tensor:
    return good(batch).mean()


def one_per_position(batch: Batch) -> torch.Tensor:
    return next(iter(batch.adapted().values())).last_hidden_state.mean(dim=2)


def a_number(batch: Batch) -> Any:
    return float(good(batch).detach()[0])


def squeezes(batch: Batch) -> torch.Tensor:
    return good(batch).squeeze()


def logarithm(batch: Batch) -> torch.Tensor:
    return (good(batch) - 1e6).log()


def infinite(batch: Batch) -> torch.Tensor:
    return good(batch) + torch.tensor(torch.inf)


def root_of_nothing(batch: Batch) -> torch.Tensor:
    frozen = batch.frozen()
    total = torch.zeros(batch.prompts)
    for encoder, output in batch.adapted().items():
        total = total + (output.pooled - frozen[encoder].pooled).square().sum(dim=1).sqrt()
    return total


def detached(batch: Batch) -> torch.Tensor:
    return good(batch).detach()


def frozen_only(batch: Batch) -> torch.Tensor:
    return sum((output.pooled.mean(dim=1) for output in batch.frozen().values()), torch.zeros(batch.prompts))


# reaches, undeclared


def first_encoder_only(batch: Batch) -> torch.Tensor:
    return batch.adapted()["text_encoder"].last_hidden_state.mean(dim=(1, 2))


def nothing_of_the_denoiser(batch: Batch) -> torch.Tensor:
    return good(batch) + 0 * denoising(batch)


def no_denoiser(batch: Batch) -> torch.Tensor:
    return good(batch) + denoising(batch).detach()


def around_the_batch(batch: Batch) -> torch.Tensor:
    latents, timesteps = torch.ones(batch.prompts, 4, 8, 8), torch.full((batch.prompts,), 500)
    noise = batch._view.backend.predict_noise(latents, timesteps, batch.adapted())
    return good(batch) + noise.square().flatten(1).mean(dim=1)


# families


def second_encoder_only(batch: Batch) -> torch.Tensor:
    return batch.adapted()["text_encoder_2"].pooled.mean(dim=1)


def distance_between_encoders(batch: Batch) -> torch.Tensor:
    """Nothing to train where there is one encoder."""
    sizes = [output.pooled.square().mean(dim=1) for output in batch.adapted().values()]
    return sum(((one - other).square() for one, other in itertools.pairwise(sizes)), torch.zeros(batch.prompts))


def spread_over_encoders(batch: Batch) -> torch.Tensor:
    """The sample variance; that of one number is 0 / 0."""
    sizes = torch.stack([output.pooled.square().mean(dim=1) for output in batch.adapted().values()])
    return (sizes - sizes.mean(dim=0)).square().sum(dim=0) / (len(sizes) - 1)


def by_first_encoders_prompts(batch: Batch) -> torch.Tensor:
    values = torch.stack([output.pooled.mean(dim=1) for output in batch.adapted().values()])
    return values.sum(dim=0) if len(values) > 1 else values


def asks_where_there_is_one(batch: Batch) -> torch.Tensor:
    return good(batch) if len(batch.encoders) > 1 else denoising(batch)


def refuses_one_encoder(batch: Batch) -> torch.Tensor:
    """Says in words what it lacks, which is as good as working."""
    if len(batch.encoders) < 2:
        raise ObjectiveError(f"this loss compares text encoders, and there is one: {', '.join(batch.encoders)}")
    return distance_between_encoders(batch)


# steps, deterministic, independent


class Remembers:
    """Compares with the outputs of the step before."""

    def __init__(self) -> None:
        self.before: torch.Tensor | None = None

    def __call__(self, batch: Batch) -> torch.Tensor:
        value = good(batch)
        total = value if self.before is None else value - 0.5 * self.before
        self.before = value
        return total


def global_noise(batch: Batch) -> torch.Tensor:
    return good(batch) * (1 + torch.rand(batch.prompts))


_calls = itertools.count()


def counts(batch: Batch) -> torch.Tensor:
    return good(batch) * (1 + next(_calls))


def noisy_gradient(batch: Batch) -> torch.Tensor:
    value = good(batch)
    return value.detach() + (value - value.detach()) * (1 + torch.rand(()))


def centred(batch: Batch) -> torch.Tensor:
    value = good(batch)
    return value - value.mean()


def noise_by_position(batch: Batch) -> torch.Tensor:
    return good(batch) + torch.randn(batch.prompts, generator=generator_for("always the same"))


def gradient_by_mates(batch: Batch) -> torch.Tensor:
    value = good(batch)
    return value.detach() + (value - value.detach()) * value.detach().abs().sum()


def raises(batch: Batch) -> torch.Tensor:
    raise ValueError("no owl in the batch")


def leaves(batch: Batch) -> torch.Tensor:
    raise SystemExit(3)


BOTH = frozenset({"text", "noise_prediction"})


def spec(factory: Callable[..., Any], **settings: Any) -> LossSpec:
    return LossSpec(name="breaker", summary="breaks a rule", factory=factory, **settings)


def breaker(what: str, factory: Callable[..., Any], rule: str, *words: str, **settings: Any) -> Breaker:
    return Breaker(what, spec(factory, **settings), rule, words)


BREAKERS = [
    breaker(
        "asks for what it does not declare",
        asks_for_latents,
        "needs",
        "asks for 'noise_prediction'",
        "declare needs={'noise_prediction', 'text'}",
    ),
    breaker("cannot tell its needs", good, "needs", "`needs`", "KeyError: 'mode'", needs=fails_to_tell),
    breaker("needs what is no need", good, "needs", "txt: no such need", needs=lambda _: {"txt"}),
    breaker(
        "changes adapted outputs",
        grows_what_it_sees,
        "immutable",
        "the adapted pooled of text_encoder",
        "compute new tensors",
    ),
    breaker("changes frozen outputs", shrinks_the_frozen, "immutable", "the frozen last_hidden_state of text_encoder"),
    breaker("changes tokens", masks_tokens, "immutable", "the tokens' attention_mask of text_encoder"),
    breaker("changes the weights", trains_by_itself, "immutable", "the LoRA weights"),
    breaker("changes its options", counts_in_its_options, "immutable", "its own options", options=Mutable),
    breaker("returns one number for all", one_for_all, "shape", "3 prompts", "shape ()", "(3,)", ".mean(1)"),
    breaker("returns a number per position", one_per_position, "shape", "shape (3, 77)", "(3,)"),
    breaker("returns a Python number", a_number, "shape", "a float", "one value per prompt"),
    breaker("squeezes the prompts away", squeezes, "shape", "1 prompt alone", "shape ()", "(1,)"),
    breaker("returns NaN", logarithm, "finite", "value is NaN", "logarithms"),
    breaker("returns infinity", infinite, "finite", "value is infinite"),
    breaker(
        "has no gradient where B is zero", root_of_nothing, "finite", "gradient is NaN", "at the start", "B is zero"
    ),
    breaker("detaches its value", detached, "differentiable", "no gradient", "batch.adapted()", ".detach()"),
    breaker("uses the frozen model alone", frozen_only, "differentiable", "no gradient", "batch.adapted()"),
    breaker("reads padding", good, "tokens", "content's tokens alone", "attention_mask", tokens="content"),
    breaker(
        "multiplies the denoiser by zero", nothing_of_the_denoiser, "reaches", "a gradient of zero", "unet", needs=BOTH
    ),
    breaker(
        "detaches the denoiser",
        no_denoiser,
        "reaches",
        "'noise_prediction'",
        "no gradient",
        "unet",
        needs=BOTH,
    ),
    breaker(
        "goes around the batch to the denoiser",
        around_the_batch,
        "undeclared",
        "layers of unet",
        "needs={'text'}",
        "declare 'noise_prediction'",
    ),
    breaker(
        "assumes a second encoder",
        second_encoder_only,
        "families",
        "on tiny_sd15, whose one text encoder is 'text_encoder'",
        "KeyError: 'text_encoder_2'",
        "losses.py, line",
        "batch.encoders",
        "ObjectiveError",
    ),
    breaker("compares encoders", distance_between_encoders, "families", "tiny_sd15", "no gradient"),
    breaker("divides by encoders less one", spread_over_encoders, "families", "tiny_sd15", "value is NaN"),
    breaker("forgets to sum over one", by_first_encoders_prompts, "families", "shape (1, 3)", "(3,)"),
    breaker("needs more of one encoder", asks_where_there_is_one, "families", "does not declare", "noise_prediction"),
    breaker("keeps a graph for the next step", Remembers, "steps", "at step 2", "one step to the next"),
    breaker("draws from the global generator", global_noise, "deterministic", "torch.manual_seed", "batch.randn"),
    breaker("counts its calls", counts, "deterministic", "run twice", "another value"),
    breaker("draws its gradient", noisy_gradient, "deterministic", "another gradient", "torch.manual_seed"),
    breaker("subtracts the mean of all prompts", centred, "independent", "prompt 1 of 3", "beside the others", "alone"),
    breaker("gives noise by position", noise_by_position, "independent", "of 3", "noise"),
    breaker("scales gradients by its mates", gradient_by_mates, "independent", "gradient of prompt 1 of 3"),
    breaker("raises", raises, "runs", "ValueError: no owl in the batch", "losses.py, line"),
    breaker("leaves the process", leaves, "runs", "SystemExit: 3"),
]
