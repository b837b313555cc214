"""What plugins are examined on: the tiny models, opened once per process, and banks for a few people's prompts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from lora_forge.bank import Bank, BankSlot
from lora_forge.batch import ModelView, Texts
from lora_forge.builtin.backends import lora_forge_backends
from lora_forge.config.model import read_model_config
from lora_forge.contracts import Backend, BackendRequest, EncoderOutput, TargetLayer, Tokens
from lora_forge.plugins import Plugin, Supplied, build
from lora_forge.records import BackendSpec
from lora_forge.seeds import generator_for

TINY = "tiny_sdxl"
ONE_ENCODER = "tiny_sd15"  # a family with one text encoder, of which the denoiser is given something else
RANK, ALPHA = 3, 5.0  # ΔW = 5/3 · B @ A: a scale that is forgotten, or taken for a power of two, shows
# One prompt, seed and set of weights for each number; who trains beside whom is varied.
PROMPTS = (
    "a steampunk owl",
    "mist over a harbour at dawn",
    "three red chairs",
    "ein Käse mit Löchern",
    "portrait of an old sailor, oil on canvas",
)


def open_backend(spec: BackendSpec, options: Any) -> Any:
    """What a backend's factory gives for its own tiny model, on the CPU in float32."""
    made = build(Supplied(spec, Plugin(f"{spec.name}:given", spec.name, "", "")), options)
    return made(BackendRequest(spec.tiny, "cpu", "float32"))


def adapt(backend: Backend, layers: Sequence[TargetLayer], slot: BankSlot) -> None:
    """Have the layers adapted one component at a time, as a run does."""
    for component in dict.fromkeys(layer.component for layer in layers):
        backend.adapt([layer for layer in layers if layer.component == component], RANK, ALPHA, slot)


def personal_bank(layers: Sequence[TargetLayer], people: Sequence[int], *, zero_b: bool = False) -> Bank:
    """A bank with each one's own weights: A as large as inits are, and B such that ΔW is about a fifth of W.

    zero_b: B is zero, as at the start of a run.
    """
    bank = Bank(layers, rank=RANK, alpha=ALPHA, prompts=len(people))
    with torch.no_grad():
        for row, person in enumerate(people):
            bank.parameter[row] = _weights_of(tuple(layers), person)
        for pair in bank.pairs.values():
            if zero_b:
                pair.lora_B.zero_()
    return bank


@functools.lru_cache(maxsize=32)
def _weights_of(layers: tuple[TargetLayer, ...], person: int) -> torch.Tensor:
    bank = Bank(layers, rank=RANK, alpha=ALPHA, prompts=1)
    generator = generator_for(f"weights of {person}")
    with torch.no_grad():
        for layer in layers:
            lora_a, lora_b = bank.pairs[layer.key]
            lora_a.copy_(torch.randn(lora_a.shape, generator=generator) / layer.in_features**0.5)
            lora_b.copy_(torch.randn(lora_b.shape, generator=generator) * 0.07)
    return bank.parameter.detach()[0].clone()


@dataclass(frozen=True)
class Stage:
    """An opened model, with the components of its layers loaded and adapted."""

    spec: BackendSpec
    backend: Backend
    layers: tuple[TargetLayer, ...]
    slot: BankSlot

    def view(self, people: Sequence[int]) -> WatchedView:
        """A fresh view of these people's prompts, with every encoder that is loaded in use."""
        loaded = {layer.component for layer in self.layers}
        texts = {one: [PROMPTS[person] for person in people] for one in self.spec.encoders if one in loaded}
        return WatchedView(self.backend, self.slot, texts, [100 + person for person in people], "cpu")


@functools.cache
def tiny_stage(model: str = TINY, needs: frozenset[str] | None = None) -> Stage:
    """A tiny model through its built-in backend; a LoRA on all attention layers of what is loaded.

    needs: load what these reach and no more, as a run does; everything if None.
    """
    spec = backend_of(model)
    reached = spec.components if needs is None else {one for need in needs for one in spec.reaches.get(need, ())}
    layers = tuple(layer for layer in tiny_layers(model) if layer.component in reached)
    backend = cast(Backend, open_backend(spec, spec.options()))
    backend.load([component for component in spec.components if component in reached])
    slot = BankSlot()
    adapt(backend, layers, slot)
    return Stage(spec, backend, layers, slot)


def backend_of(model: str) -> BackendSpec:
    """The built-in backend of a tiny model."""
    return next(spec for spec in lora_forge_backends() if spec.tiny == model)


@functools.cache
def tiny_layers(model: str = TINY) -> tuple[TargetLayer, ...]:
    """The target layers of a tiny model's config, without opening the model."""
    config = read_model_config(model)
    return tuple(
        TargetLayer(component, name, *config.dimensions[component][name])
        for component, names in config.targets.items()
        for name in names
    )


def some_layers(model: str = TINY, *, each: int = 4) -> list[TargetLayer]:
    """A few layers of each component of a tiny model, of as many different sizes as there are."""
    chosen: list[TargetLayer] = []
    for component in dict.fromkeys(layer.component for layer in tiny_layers(model)):
        own = [layer for layer in tiny_layers(model) if layer.component == component]
        sizes = {(layer.out_features, layer.in_features): layer for layer in own}
        first = list(sizes.values())[:each]
        chosen += first + [layer for layer in own if layer not in first][: each - len(first)]
    return chosen


@dataclass(frozen=True)
class _Handed:
    what: str
    tensor: torch.Tensor
    copy: torch.Tensor = field(repr=False)


class WatchedView(ModelView):
    """A view that keeps a copy of every tensor it hands out, to see whether a loss changes one."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._handed: dict[int, _Handed] = {}

    def changed(self) -> list[str]:
        """What was handed out and is no longer what it was, in words."""
        return [one.what for one in self._handed.values() if not _same(one.tensor.detach(), one.copy)]

    def tokens(self, texts: Texts) -> dict[str, Tokens]:
        tokens = super().tokens(texts)
        for encoder, own in tokens.items():
            for name in ("input_ids", "attention_mask"):
                self._note(f"the tokens' {name} of {encoder}", getattr(own, name))
        return tokens

    def _run(self, texts: Texts, masked: bool) -> dict[str, EncoderOutput]:
        outputs = super()._run(texts, masked)
        which = "adapted" if self.slot.active else "frozen"
        for encoder, output in outputs.items():
            for name in ("last_hidden_state", "penultimate_hidden_state", "pooled"):
                self._note(f"the {which} {name} of {encoder}", getattr(output, name))
        return outputs

    def _note(self, what: str, tensor: torch.Tensor) -> None:
        if id(tensor) not in self._handed:
            self._handed[id(tensor)] = _Handed(what, tensor, tensor.detach().clone())


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal to the bit, NaN included."""
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())
