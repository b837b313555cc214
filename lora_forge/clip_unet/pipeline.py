"""A diffusers pipeline of a base model, whole, made of the parts that a LoRA's pictures need and of no others.

Each part is read as the backend itself reads it, so that a single-file checkpoint needs no network, and of a repository
on the Hub nothing is downloaded but these parts.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lora_forge.clip_unet.encoders import load_encoder
from lora_forge.clip_unet.family import UNET, VAE, Family
from lora_forge.clip_unet.sources import Source
from lora_forge.errors import ModelError

if TYPE_CHECKING:
    import torch

_SETTINGS = {"requires_safety_checker": False, "add_watermarker": False}
SCHEDULER = "scheduler/scheduler_config.json"


def load_pipeline(source: Source, family: Family, dtype: torch.dtype) -> Any:
    """The family's pipeline, frozen, on the CPU, without safety checker and watermark. Raises ModelError."""
    import diffusers
    from transformers import CLIPTokenizer

    parts: dict[str, Any] = {"scheduler": _scheduler(source)}
    for component, kind in family.encoders.items():
        parts[kind.tokenizer] = CLIPTokenizer.from_pretrained(source.tokenizer(kind.tokenizer))
        parts[component] = load_encoder(component, kind, source, device="cpu", dtype=dtype)
    for component in (UNET, VAE):
        parts[component] = load_model(source, component, dtype)
    with _quiet("transformers"):  # its import remarks on packages that no picture here needs
        made = getattr(diffusers, family.pipeline)
    recorded = source.optional_json("model_index.json")
    for name, parameter in inspect.signature(made).parameters.items():
        if name in parts:
            continue
        if name in _SETTINGS:
            parts[name] = _SETTINGS[name]
        elif isinstance(recorded.get(name), bool):  # such as force_zeros_for_empty_prompt
            parts[name] = recorded[name]
        elif parameter.default is parameter.empty:  # such as a safety checker
            parts[name] = None
    return made(**parts)


@contextmanager
def _quiet(library: str) -> Iterator[None]:
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def load_model(source: Source, component: str, dtype: torch.dtype) -> Any:
    """The UNet or the VAE, through diffusers, frozen, on the CPU. Raises ModelError, also for its own errors."""
    try:
        with _quiet("diffusers"):  # it warns of a list of exceptions that is empty
            return source.load_model(component, dtype).requires_grad_(False).eval()
    except ModelError:
        raise
    except Exception as error:  # diffusers' own, of no common type
        raise ModelError(f"base model {source.name!r}: {component}: {' '.join(str(error).split())}") from error


def _scheduler(source: Source) -> Any:
    """Of the class that the model's index names, as diffusers chooses it, or else that its own config names."""
    import diffusers

    config = source.optional_json(SCHEDULER)
    listed = source.optional_json("model_index.json").get("scheduler")
    name = listed[1] if isinstance(listed, list) and len(listed) == 2 else config.get("_class_name")
    kind = getattr(diffusers, str(name), None)
    if not config or not isinstance(kind, type) or not issubclass(kind, diffusers.SchedulerMixin):
        problem = f"its scheduler is a {json.dumps(name)}" if config else f"it has no {SCHEDULER}"
        raise ModelError(f"base model {source.name!r} makes no pictures: {problem}")
    return kind.from_config(config)  # type: ignore[attr-defined]
