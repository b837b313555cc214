"""Make each optimizer, over the parameters of a bank or of one prompt. Imported when one is used."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Iterable
from typing import Any

import torch

from lora_forge.errors import PluginError
from lora_forge.schedules import scheduled
from lora_forge_optimizers.options import (
    AdafactorOptions,
    AdamW8bitOptions,
    LionOptions,
    ProdigyOptions,
    ScheduleFreeAdamWOptions,
)

Parameters = Iterable[torch.nn.Parameter]


def prodigy(parameters: Parameters, options: ProdigyOptions, iterations: int) -> torch.optim.Optimizer:
    """Mishchenko & Defazio, Prodigy: An Expeditiously Adaptive Parameter-Free Learner (arXiv:2306.06101)."""
    library = _library("prodigyopt", "prodigy")
    optimizer: torch.optim.Optimizer = library.Prodigy(
        # As an argument of its own, the library would announce it on stdout, which may be somebody's JSON.
        [{"params": list(parameters), "weight_decay": options.weight_decay}],
        lr=options.lr,
        betas=options.betas,
        beta3=options.beta3,
        eps=options.eps,
        decouple=options.decouple,
        use_bias_correction=options.use_bias_correction,
        safeguard_warmup=options.safeguard_warmup,
        d0=options.d0,
        d_coef=options.d_coef,
        growth_rate=math.inf if options.growth_rate is None else options.growth_rate,
        slice_p=options.slice_p,
    )
    return scheduled(optimizer, options, iterations)


def lion(parameters: Parameters, options: LionOptions, iterations: int) -> torch.optim.Optimizer:
    """Chen et al., Symbolic Discovery of Optimization Algorithms (arXiv:2302.06675)."""
    library = _library("lion_pytorch", "lion", "lion-pytorch")
    optimizer: torch.optim.Optimizer = library.Lion(
        parameters,
        lr=options.lr,
        betas=options.betas,
        weight_decay=options.weight_decay,
        decoupled_weight_decay=options.decoupled_weight_decay,
    )
    return scheduled(optimizer, options, iterations)


def adafactor(parameters: Parameters, options: AdafactorOptions, iterations: int) -> torch.optim.Optimizer:
    """Shazeer & Stern, Adafactor: Adaptive Learning Rates with Sublinear Memory Cost (arXiv:1804.04235).

    transformers', not torch's: torch's always steps in proportion to a matrix' size, and B starts at zero.
    """
    optimizer: torch.optim.Optimizer = _library("transformers.optimization", "adafactor", "transformers").Adafactor(
        parameters,
        lr=None if options.relative_step else options.lr,
        eps=options.eps,
        clip_threshold=options.clip_threshold,
        decay_rate=options.decay_rate,
        beta1=options.beta1,
        weight_decay=options.weight_decay,
        scale_parameter=options.scale_parameter,
        relative_step=options.relative_step,
        warmup_init=options.warmup_init,
    )
    return scheduled(optimizer, options, iterations)


def adamw8bit(parameters: Parameters, options: AdamW8bitOptions, iterations: int) -> torch.optim.Optimizer:
    """Dettmers et al., 8-bit Optimizers via Block-wise Quantization (arXiv:2110.02861).

    Raises PluginError where bitsandbytes is missing, or has nothing to run on the parameters' device.
    """
    library = _library("bitsandbytes", "adamw8bit")
    own = list(parameters)
    for device in {parameter.device for parameter in own}:
        _try_8bit(library, device)
    optimizer: torch.optim.Optimizer = library.optim.AdamW8bit(
        own,
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
        min_8bit_size=options.min_8bit_size,
    )
    return scheduled(optimizer, options, iterations)


def schedule_free_adamw(parameters: Parameters, options: ScheduleFreeAdamWOptions) -> torch.optim.Optimizer:
    """Defazio et al., The Road Less Scheduled (arXiv:2405.15682).

    Trains at y, a point between the average x and the latest weights; a run ends with its `eval()`, which
    puts x in place.
    """
    optimizer = _library("schedulefree", "schedule_free_adamw").AdamWScheduleFree(
        parameters,
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
        warmup_steps=options.warmup,
        r=options.r,
        weight_lr_power=options.weight_lr_power,
    )
    optimizer.train()
    made: torch.optim.Optimizer = optimizer
    return made


def _library(module: str, optimizer: str, distribution: str = "") -> Any:
    """A library that one optimizer needs. Raises PluginError if it is missing or cannot be imported."""
    name = distribution or module
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise PluginError(
            f"optimizer {optimizer!r} needs {name}, which is not installed; pip install {name}"
        ) from error
    except Exception as error:
        raise PluginError(f"optimizer {optimizer!r} needs {name}, which cannot be imported: {_line(error)}") from error


@functools.cache
def _try_8bit(library: Any, device: torch.device) -> None:
    """Take a step on numbers of no meaning, with 8 bits and with 32; whether that works is known only then."""
    try:
        probes = [torch.nn.Parameter(torch.ones(size, device=device)) for size in (256, 1)]
        optimizer = library.optim.AdamW8bit(probes, min_8bit_size=2)
        for probe in probes:
            probe.grad = torch.ones_like(probe)
        optimizer.step()
    except Exception as error:
        raise PluginError(
            f"optimizer 'adamw8bit' cannot run: bitsandbytes {library.__version__} does not work on {device.type} here "
            f"({_line(error)}); update it, use another device, or --optimizer adamw"
        ) from error


def _line(error: Exception) -> str:
    """An error in one line of bearable length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": ")
