"""What a run does with each optimizer is what a plain loop does with the library, called directly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import TELLING, each, needs_bitsandbytes, options
from lora_forge_optimizers import factories
from torch import nn
from watched import apart, flat_weights, steppers, watched

import lora_forge
from lora_forge.errors import ConfigError

Make = Callable[[list[nn.Parameter]], Any]
STEPS = 8
LR = 1e-4  # tiny_sdxl's


def library(name: str, **changed: Any) -> Make:
    """The library's optimizer with everything spelt out that is not its own default."""
    if name == "prodigy":
        recommended = {"use_bias_correction": True, "safeguard_warmup": True, "weight_decay": 0.01}
        made = pytest.importorskip("prodigyopt").Prodigy
        return partial(made, **{"lr": 1.0, "d0": 1e-4, **recommended, **changed})
    if name == "lion":
        return partial(pytest.importorskip("lion_pytorch").Lion, **{"lr": LR, **changed})
    if name == "adafactor":
        made = pytest.importorskip("transformers.optimization").Adafactor
        return partial(made, **{"lr": LR, "relative_step": False, "scale_parameter": False, **changed})
    if name == "adamw8bit":
        return partial(pytest.importorskip("bitsandbytes").optim.AdamW8bit, **{"lr": LR, **changed})
    assert name == "schedule_free_adamw"
    if "warmup" in changed:
        changed["warmup_steps"] = changed.pop("warmup")
    return partial(pytest.importorskip("schedulefree").AdamWScheduleFree, **{"lr": LR, **changed})


def schedule(name: str, *, warmup: int) -> Callable[[Any], Any]:
    """The schedule that transformers makes."""
    make = pytest.importorskip("transformers").get_scheduler
    return partial(make, name, num_warmup_steps=warmup, num_training_steps=STEPS)


def assert_same(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    # A dot product, which Prodigy has, is rounded by where in memory its vectors lie.
    tolerance = 1e-6 if name == "prodigy" else 0.0
    assert apart(found, expected) <= tolerance


@each
@pytest.mark.parametrize("telling", [False, True], ids=["by default", "with telling options"])
def test_a_run_is_a_plain_loop_with_the_library(name: str, telling: bool) -> None:
    changed = TELLING[name] if telling else {}
    with watched() as optimizers:
        result = lora_forge.run("an owl", "tiny_sdxl", iterations=STEPS, optimizer={"name": name, "options": changed})
    (one,) = steppers(optimizers, STEPS)
    expected = one.replay(library(name, **changed))
    assert not torch.equal(expected, torch.cat([tensor.flatten() for tensor in one.start]))
    assert_same(name, flat_weights(result), expected)


@each
def test_a_schedule_is_the_one_that_transformers_makes(name: str) -> None:
    if name == "schedule_free_adamw":
        with pytest.raises(ConfigError, match=r"schedule_free_adamw\.schedule: unknown option"):
            lora_forge.run("an owl", "tiny_sdxl", optimizer={"name": name, "options": {"schedule": "cosine"}})
        return
    chosen = {**TELLING[name], "schedule": "cosine", "warmup": 2}
    with watched() as optimizers:
        result = lora_forge.run("an owl", "tiny_sdxl", iterations=STEPS, optimizer={"name": name, "options": chosen})
    (one,) = steppers(optimizers, STEPS)
    make = library(name, **TELLING[name])
    assert_same(name, flat_weights(result), one.replay(make, schedule("cosine", warmup=2)))
    assert apart(flat_weights(result), one.replay(make)) > 1e-6, "the schedule changes nothing"


def test_schedule_free_gives_the_average_and_not_the_point_it_trains_at() -> None:
    chosen = {"lr": 1e-3, "weight_decay": 0.1}
    with watched() as optimizers:
        result = lora_forge.run(
            "an owl", "tiny_sdxl", iterations=STEPS, optimizer={"name": "schedule_free_adamw", "options": chosen}
        )
    (one,) = optimizers
    # The paper's three sequences, in double precision: z is moved, x is its average, y lies between them.
    y = z = x = one.start[0].double()
    second = torch.zeros_like(z)
    for step, (recorded,) in enumerate(one.gradients, start=1):
        gradient = recorded.double()
        second = 0.999 * second + 0.001 * gradient.square()
        z = z - 1e-3 * (gradient / ((second / (1 - 0.999**step)).sqrt() + 1e-8) + 0.1 * y)
        x = x + (z - x) / step
        y = 0.1 * z + 0.9 * x
    assert apart(one.last[0], y) < 1e-5
    assert apart(flat_weights(result), x.flatten()) < 1e-5
    assert apart(y, x) > 1e-3


def test_adafactor_has_the_papers_own_learning_rate_as_an_option() -> None:
    chosen = {"relative_step": True, "scale_parameter": True, "warmup_init": True}
    with watched() as optimizers:
        result = lora_forge.run("an owl", "tiny_sdxl", iterations=3, optimizer={"name": "adafactor", "options": chosen})
    (one,) = optimizers
    assert_same("adafactor", flat_weights(result), one.replay(library("adafactor", lr=None, **chosen)))


@pytest.mark.parametrize(
    ("name", "changed", "renamed"),
    [
        (
            "prodigy",
            {
                "lr": 0.5,
                "d_coef": 2.0,
                "d0": 1e-3,
                "growth_rate": 1.5,
                "betas": (0.8, 0.99),
                "beta3": 0.9,
                "eps": 1e-7,
                "weight_decay": 0.2,
                "decouple": False,
                "use_bias_correction": False,
                "safeguard_warmup": False,
                "slice_p": 11,
            },
            {},
        ),
        ("lion", {"lr": 0.5, "betas": (0.8, 0.95), "weight_decay": 0.2}, {}),
        (
            "adafactor",
            {
                "lr": 0.5,
                "eps": (1e-20, 0.1),
                "clip_threshold": 2.0,
                "decay_rate": -0.5,
                "beta1": 0.5,
                "weight_decay": 0.2,
                "scale_parameter": True,
            },
            {},
        ),
        pytest.param(
            "adamw8bit",
            {"lr": 0.5, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.2},
            {},
            marks=needs_bitsandbytes,
        ),
        (
            "schedule_free_adamw",
            {
                "lr": 0.5,
                "warmup": 7,
                "betas": (0.8, 0.95),
                "eps": 1e-7,
                "weight_decay": 0.2,
                "r": 1.0,
                "weight_lr_power": 1.0,
            },
            {"warmup": "warmup_steps"},
        ),
    ],
)
def test_every_option_reaches_the_library(name: str, changed: dict[str, Any], renamed: dict[str, str]) -> None:
    given = options(name, **changed)
    assert all(getattr(given, f.name) != f.default for f in dataclasses.fields(given) if f.name in changed)
    make = getattr(factories, name)
    arguments = () if name == "schedule_free_adamw" else (10,)
    (group,) = make([nn.Parameter(torch.ones(2, 3))], given, *arguments).param_groups
    assert {key: group[renamed.get(key, key)] for key in changed} == changed
