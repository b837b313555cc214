"""What diffusers makes of a LoRA file: loaded by its public reader, and read out of the PEFT layers it placed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

PIPELINES = {"sdxl": "StableDiffusionXLPipeline", "sd15": "StableDiffusionPipeline"}
COMPONENTS = ("text_encoder", "text_encoder_2", "unet")
Layers = dict[tuple[str, str], "Loaded"]


class Loaded(NamedTuple):
    """One layer as diffusers loaded it."""

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: float

    @property
    def delta(self) -> torch.Tensor:
        return self.scaling * self.lora_B @ self.lora_A


def open_pipeline(family: str, folder: Path) -> Any:
    """A model's folder in the pipeline that people draw with it, in float32."""
    import diffusers

    return getattr(diffusers, PIPELINES[family]).from_pretrained(folder, dtype=torch.float32)


class _Collect(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def complaints() -> Iterator[list[str]]:
    """All warnings that diffusers, transformers and PEFT give meanwhile, logged or warned."""
    handler = _Collect()
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "peft")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            yield handler.lines
        handler.lines += [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


def load_whole(pipe: Any, file: Path, *, without: Collection[str] = ()) -> Layers:
    """The layers diffusers puts LoRA into, by component and canonical name; fails on any complaint of its.

    without: components the file leaves out, which diffusers remarks on.
    """
    with complaints() as lines:
        pipe.load_lora_weights(str(file))
    try:
        layers = dict(_lora_layers(pipe))
    finally:
        pipe.unload_lora_weights()
    remarks = tuple(f"No LoRA keys associated to {type(getattr(pipe, name)).__name__} " for name in without)
    assert [line for line in lines if not line.startswith(remarks)] == []
    assert not {component for component, _ in layers} & set(without)
    return layers


def _lora_layers(pipe: Any) -> Iterator[tuple[tuple[str, str], Loaded]]:
    for component in (name for name in COMPONENTS if hasattr(pipe, name)):
        for path, module in getattr(pipe, component).named_modules():
            for adapter in getattr(module, "lora_A", {}):
                name = path if component == "unet" else f"text_model.{path.removeprefix('text_model.')}"
                lora_a, lora_b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
                loaded = Loaded(lora_a.detach().clone(), lora_b.detach().clone(), module.scaling[adapter])
                yield (component, name), loaded
