"""Examining what a backend says of its denoiser, and of pictures: noise, its schedule, attention, the decoder."""

from __future__ import annotations

from typing import Any

import torch

from lora_forge.contracts import Backend
from lora_forge.testing.backend_model import Model
from lora_forge.testing.compare import TOGETHER, not_finite, same_bits, shape_of
from lora_forge.testing.examination import Book, Broken

_SUMS_TO_ONE = 1e-3  # of probabilities that may have been made in half precision


def examine_denoiser(book: Book, model: Model) -> None:
    """The rules on what `reaches` says the backend serves beside `text`; the model is loaded and bare."""
    if "noise_prediction" in model.spec.reaches:
        with book.rule("noise", vital=True):
            _check_noise(model)
        if type(model.backend).alphas_cumprod is not Backend.alphas_cumprod:
            with book.rule("schedule"):
                _check_schedule(model.backend.alphas_cumprod())
    if "attention" in model.spec.reaches:
        with book.rule("attention", vital=True):
            _check_attention(model)
    if "vae" in model.spec.reaches:
        with book.rule("decode", vital=True):
            _check_decode(model)


def _check_noise(model: Model) -> None:
    try:
        shape = model.backend.latent_shape()
        noise = model.noise(TOGETHER, model.encode(TOGETHER, masked=False))
    except NotImplementedError as error:
        raise Broken(
            "`reaches` has 'noise_prediction', but latent_shape() or predict_noise() is not there; write both, or "
            "leave the need out"
        ) from error
    if not isinstance(shape, tuple) or [type(one) for one in shape] != [int, int, int]:
        raise Broken(f"latent_shape() is {shape!r}; give (channels, height, width)")
    expected = (len(TOGETHER), *shape)
    if not isinstance(noise, torch.Tensor) or tuple(noise.shape) != expected:
        raise Broken(f"predicted noise has {shape_of(noise)}, not that of the latents, {expected}")
    _check_numbers("predicted noise", noise)


def _check_schedule(alphas: Any) -> None:
    if not isinstance(alphas, torch.Tensor) or alphas.ndim != 1 or len(alphas) < 2:
        raise Broken(f"alphas_cumprod() has {shape_of(alphas)}; give one number for each training timestep")
    _check_numbers("alphas_cumprod()", alphas)
    if not 0 <= float(alphas.min()) <= float(alphas.max()) <= 1 or not bool((alphas.diff() < 0).all()):
        raise Broken(
            f"alphas_cumprod() goes from {float(alphas[0]):.3g} to {float(alphas[-1]):.3g}; it is the picture's share "
            "of a latent's variance, falling from timestep 0 on, between 1 and 0"
        )


def _check_attention(model: Model) -> None:
    try:
        maps = model.attention(TOGETHER, model.encode(TOGETHER, masked=False))
    except NotImplementedError as error:
        raise Broken(
            "`reaches` has 'attention', but cross_attention() is not there; write it, or leave it out"
        ) from error
    if not isinstance(maps, dict) or not maps:
        raise Broken(f"cross_attention() is {maps!r}; give a tensor for each layer, by its path")
    for path, one in maps.items():
        if not isinstance(one, torch.Tensor) or one.ndim != 4 or len(one) != len(TOGETHER):
            got = f"{shape_of(one)} for {len(TOGETHER)} prompts"
            raise Broken(f"cross_attention() of {path} has {got}; give (prompts, height, width, tokens)")
        _check_numbers(f"cross_attention() of {path}", one)
        sums = one.detach().sum(dim=-1)
        if float(one.detach().min()) < 0 or float((sums - 1).abs().max()) > _SUMS_TO_ONE:
            raise Broken(
                f"cross_attention() of {path} sums to {float(sums.flatten()[0]):.3g} over the tokens; give "
                "probabilities, which are not negative and sum to 1 in every place"
            )


def _check_decode(model: Model) -> None:
    latents = model.latents(TOGETHER).requires_grad_()
    try:
        pictures = model.backend.decode(latents)
    except NotImplementedError as error:
        raise Broken("`reaches` has 'vae', but decode() is not there; write it, or leave the need out") from error
    if not isinstance(pictures, torch.Tensor) or pictures.ndim != 4 or tuple(pictures.shape[:2]) != (len(latents), 3):
        raise Broken(f"decode() has {shape_of(pictures)} for {len(latents)} latents; give (prompts, 3, height, width)")
    _check_numbers("decode()", pictures)
    low, high = float(pictures.detach().min()), float(pictures.detach().max())
    if low < 0 or high > 1:
        raise Broken(f"decode() gives values from {low:.3g} to {high:.3g}; give pictures in [0, 1]")
    if not pictures.requires_grad or not bool(torch.autograd.grad(pictures.sum(), latents)[0].any()):
        raise Broken("no gradient of what decode() gives arrives at the latents: no .detach(), no torch.no_grad()")
    if not same_bits(pictures, model.backend.decode(latents)):
        raise Broken(
            "run twice, decode() gives another picture; put the VAE in eval() mode, and take its mode, no sample"
        )


def _check_numbers(what: str, tensor: torch.Tensor) -> None:
    if tensor.dtype != torch.float32:
        raise Broken(f"{what} is {tensor.dtype}, not float32")
    if how := not_finite(tensor.detach()):
        raise Broken(f"{what} is {how}")
