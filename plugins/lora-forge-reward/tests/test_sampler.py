"""The sampler, against diffusers' own pipeline and against finite differences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from lora_forge_reward.functions import find_function
from lora_forge_reward.sampler import sample

import lora_forge
from lora_forge.batch import Batch
from lora_forge.builtin.sd15.family import SD15
from lora_forge.builtin.sdxl.family import SDXL
from lora_forge.clip_unet.tiny import tiny_folder
from lora_forge.seeds import generator_for
from lora_forge.testing.stage import personal_bank, tiny_stage

HERE = Path(__file__).parent
FAMILIES = {"tiny_sdxl": SDXL, "tiny_sd15": SD15}
NEEDS = frozenset({"text", "noise_prediction", "vae"})
PROMPT = "a steampunk owl"


def pipeline(model: str) -> Any:
    """With diffusers' DDIM, whose step to the next timestep is ours where the number of steps divides 1000."""
    family = FAMILIES[model]
    pipe = getattr(diffusers, family.pipeline).from_pretrained(
        tiny_folder(family), safety_checker=None, dtype=torch.float32
    )
    pipe.scheduler = diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize(("steps", "guidance", "negative"), [(4, 5.0, "a blurry photo"), (5, 1.0, "")], ids=str)
def test_a_picture_is_that_of_diffusers_own_pipeline_before_and_with_the_saved_lora_after(
    model: str, steps: int, guidance: float, negative: str, tmp_path: Path
) -> None:
    options = {
        "function": f"{HERE / 'rewards.py'}:watched",
        "steps": steps,
        "guidance": guidance,
        "negative": negative,
    }
    path = tmp_path / "lora.safetensors"
    loss = {"name": "reward", "options": options}
    optimizer = {"name": "adamw", "options": {"lr": 0.01}}
    result = lora_forge.run(PROMPT, model, seed=3, loss=loss, optimizer=optimizer, iterations=2, output=path)
    # The module as the run imported it.
    seen = find_function(Path(options["function"])).__globals__["SEEN"]  # type: ignore[attr-defined]
    pipe = pipeline(model)
    shape = (pipe.unet.config.in_channels, pipe.unet.config.sample_size, pipe.unet.config.sample_size)
    noise = torch.randn(shape, generator=generator_for("3/reward/1/latents"))[None]

    def picture() -> torch.Tensor:
        made = pipe(
            PROMPT,
            negative_prompt=negative,
            latents=noise,
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="pt",
        )
        return made.images  # type: ignore[no-any-return]

    assert torch.allclose(seen[-3], picture(), atol=1e-4)
    pipe.load_lora_weights(path)
    after = picture()
    assert torch.allclose(seen[-1], after, atol=1e-3)
    assert float(after.mean()) == pytest.approx(-result.after.terms["reward"], abs=1e-4)
    assert not torch.allclose(seen[-3], seen[-1], atol=1e-3)


def rewarded(gradient_steps: int) -> tuple[Any, Callable[[], torch.Tensor]]:
    """A bank of one prompt, and a smooth reward of its latents after three steps."""
    stage = tiny_stage()
    bank = personal_bank(stage.layers, [0])
    view = stage.view([0])

    def value() -> torch.Tensor:
        stage.slot.bank = bank
        view.begin_evaluation()
        latents = sample(
            Batch(view, NEEDS, "reward"),
            steps=3,
            gradient_steps=gradient_steps,
            guidance=2.0,
            negative="a blurry photo",
        )
        stage.slot.bank = None
        return latents.square().mean()

    return bank, value


def test_the_gradient_through_all_steps_is_that_of_finite_differences() -> None:
    bank, value = rewarded(gradient_steps=3)
    value().backward()
    gradient = bank.gradient.clone()
    direction = gradient / gradient.norm()
    start, far = bank.parameter.detach().clone(), 0.02
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            bank.parameter.copy_(start + sign * far * direction)
            values.append(float(value()))
    assert (values[0] - values[1]) / (2 * far) == pytest.approx(float(gradient.norm()), rel=0.02)


def test_fewer_gradient_steps_give_the_same_value_and_part_of_the_gradient() -> None:
    values, gradients = [], []
    for gradient_steps in (1, 2, 3, 5):
        bank, value = rewarded(gradient_steps)
        one = value()
        one.backward()
        values.append(one.item())
        gradients.append(bank.gradient.clone())
    assert values == pytest.approx([values[0]] * 4)
    assert torch.equal(gradients[2], gradients[3])
    assert not torch.allclose(gradients[0], gradients[1])
    assert not torch.allclose(gradients[1], gradients[2])


def test_the_gradient_of_the_last_step_alone_is_that_with_all_before_it_held_still() -> None:
    bank, value = rewarded(gradient_steps=1)
    value().backward()
    truncated = bank.gradient.clone()
    stage = tiny_stage()
    view = stage.view([0])
    stage.slot.bank = bank
    bank.zero_gradient()
    view.begin_evaluation()
    batch = Batch(view, NEEDS, "reward")
    alphas = batch.alphas_cumprod
    latents = batch.randn("latents", *batch.latent_shape)
    times = [999, 666, 332]
    for step, time in enumerate(times):
        held = latents.detach()
        noises = [
            batch.predict_noise(held, torch.tensor([time]), text, adapted=True)
            for text in (batch.encode("a blurry photo", adapted=True), batch.adapted())
        ]
        noise = noises[0] + 2.0 * (noises[1] - noises[0])
        clean = (held - (1 - alphas[time]).sqrt() * noise) / alphas[time].sqrt()
        following = alphas[times[step + 1]] if step < 2 else torch.ones(())
        latents = following.sqrt() * clean + (1 - following).sqrt() * noise
    latents.square().mean().backward()
    stage.slot.bank = None
    assert float((bank.gradient - truncated).norm() / truncated.norm()) < 1e-4
