"""`Batch.decode`: a family's own VAE, loaded when a loss first asks, and its gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from denoiser_scene import open_backend, scene_of
from diffusers_reader import open_pipeline

from lora_forge.clip_unet.family import Family
from lora_forge.errors import ModelError


def test_a_picture_and_its_gradient_are_those_of_the_pipelines_vae(
    family: Family, model: str, model_folder: Path
) -> None:
    batch = scene_of(model).batch("text", "noise_prediction", "vae")
    latents = batch.randn("latents", *batch.latent_shape).requires_grad_()
    pipe = open_pipeline(family.name, model_folder)
    pictures = batch.decode(latents)
    assert pictures.dtype == torch.float32
    assert pictures.shape[:2] == (2, 3)
    (gradient,) = torch.autograd.grad(pictures.square().sum(), latents)
    decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    expected = pipe.image_processor.postprocess(decoded, output_type="pt", do_denormalize=[True] * 2)
    torch.testing.assert_close(pictures, expected)
    inside = (decoded > -1) & (decoded < 1)
    assert inside.any()
    by_hand = torch.autograd.grad((decoded / 2 + 0.5)[inside].square().sum(), latents)[0]
    torch.testing.assert_close(gradient, by_hand)


def test_the_vae_is_loaded_when_it_is_first_needed_and_let_go_by_release(model: str) -> None:
    backend = open_backend(model)
    backend.load(["unet"])
    assert backend._decoder is None
    latents = torch.randn(1, *backend.latent_shape(), generator=torch.Generator().manual_seed(0))
    picture = backend.decode(latents)
    decoder: Any = backend._decoder
    assert not any(parameter.requires_grad for parameter in decoder.parameters())
    backend.release()
    assert backend._decoder is None
    assert torch.equal(backend.decode(latents), picture)


def test_the_vae_of_a_pipeline_in_memory_is_not_touched(family: Family, model: str, model_folder: Path) -> None:
    pipe = open_pipeline(family.name, model_folder)
    pipe.vae.half().train().requires_grad_(True)
    backend = open_backend(model, pipeline=pipe)
    picture = backend.decode(torch.zeros(1, 4, 8, 8))
    assert picture.dtype == torch.float32
    backend.release()
    assert pipe.vae.dtype == torch.float16
    assert pipe.vae.training
    assert all(parameter.requires_grad for parameter in pipe.vae.parameters())
    pipe.vae = None
    with pytest.raises(ModelError, match="in memory has no vae"):
        backend.decode(torch.zeros(1, 4, 8, 8))


def test_in_half_precision_a_picture_is_decoded_in_float32(model: str) -> None:
    backend, whole = (open_backend(model, dtype=dtype) for dtype in ("bfloat16", "float32"))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(backend.decode(latents), whole.decode(latents))
