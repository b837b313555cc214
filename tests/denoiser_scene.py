"""A tiny model as losses see it that look through its denoiser: adapted, with some people's prompts on it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from lora_forge.bank import Bank, BankSlot
from lora_forge.batch import Batch, ModelView
from lora_forge.clip_unet.options import CheckpointOptions
from lora_forge.contracts import BackendRequest
from lora_forge.plugins import Plugin, Supplied, build
from lora_forge.records import NEEDS
from lora_forge.testing.stage import PROMPTS, adapt, backend_of, personal_bank, tiny_layers

PEOPLE = (0, 1)


def open_backend(model: str, *, source: str = "", dtype: str = "float32", pipeline: Any = None, **options: Any) -> Any:
    spec = backend_of(model)
    made = build(Supplied(spec, Plugin("ours", "ours", "", "")), CheckpointOptions(**options))
    return made(BackendRequest(source or spec.tiny, "cpu", dtype, pipeline))


class Scene:
    """A tiny model whose every attention layer has a LoRA, and some people's prompts on it."""

    def __init__(self, model: str, people: Sequence[int] = PEOPLE, **settings: Any) -> None:
        self.backend = open_backend(model, **settings)
        self.encoders = backend_of(model).encoders
        self.backend.load(backend_of(model).components)
        self.slot, self.layers = BankSlot(), tiny_layers(model)
        adapt(self.backend, self.layers, self.slot)
        self.bank: Bank = personal_bank(self.layers, people)
        self.slot.bank = self.bank
        self.people = people

    def batch(self, *needs: str) -> Batch:
        texts = {encoder: [PROMPTS[person] for person in self.people] for encoder in self.encoders}
        view = ModelView(self.backend, self.slot, texts, [7 + person for person in self.people], "cpu")
        view.begin_step()
        return Batch(view, needs or NEEDS, "a_loss")

    def gradient(self, value: torch.Tensor) -> torch.Tensor:
        self.bank.zero_gradient()
        value.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
        return self.bank.gradient.clone()


@functools.cache
def scene_of(model: str) -> Scene:
    """One for all tests, which leave it as they found it."""
    return Scene(model)


def look(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and timesteps."""
    return batch.randn("latents", *batch.latent_shape), torch.tensor([900, 40])[: batch.prompts]
