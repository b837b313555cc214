"""A backend's tiny model as an examination uses it: all it says about a few people's prompts, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_forge.bank import BankLinear, BankSlot
from lora_forge.contracts import Backend, EncoderOutput, TargetLayer
from lora_forge.records import BackendSpec
from lora_forge.seeds import generator_for
from lora_forge.testing.compare import VALUE_TOLERANCE, not_finite, relative, same_bits, shape_of
from lora_forge.testing.examination import Broken
from lora_forge.testing.stage import PROMPTS, personal_bank

Outputs = dict[str, torch.Tensor]  # what the model says, in words, to a tensor (prompts, …)
ATTENTION = "cross-attention of "
_PARTS = {"last_hidden_state": 3, "penultimate_hidden_state": 3, "pooled": 2}  # and how many dimensions each has


@dataclass(frozen=True)
class Model:
    """An opened backend; layers: all of its linear layers; slot: where the bank of the moment is."""

    spec: BackendSpec
    backend: Backend
    layers: tuple[TargetLayer, ...]
    slot: BankSlot

    def outputs(self, people: Sequence[int]) -> Outputs:
        """All of the model's outputs for these people's prompts, as it is at the moment, without gradient."""
        with torch.no_grad():
            return self.outputs_with_gradient(people)

    def outputs_with_gradient(self, people: Sequence[int]) -> Outputs:
        """The same in autograd's graph, should there be one."""
        found: Outputs = {}
        unmasked = self.encode(people, masked=False)
        for how, outputs in (("", unmasked), (" (masked)", self.encode(people, masked=True))):
            for encoder, output in outputs.items():
                found |= {f"{name} of {encoder}{how}": getattr(output, name) for name in _PARTS}
        if "noise_prediction" in self.spec.reaches:
            found["predicted noise"] = self.noise(people, unmasked)
        if "attention" in self.spec.reaches:
            found |= {f"{ATTENTION}{path}": one for path, one in self.attention(people, unmasked).items()}
        return found

    def encode(self, people: Sequence[int], *, masked: bool) -> dict[str, EncoderOutput]:
        """Outputs of every encoder."""
        texts = [PROMPTS[person] for person in people]
        return {
            encoder: self.backend.encode(encoder, self.backend.tokenize(encoder, texts), masked=masked)
            for encoder in self.spec.encoders
        }

    def noise(self, people: Sequence[int], outputs: Mapping[str, EncoderOutput]) -> torch.Tensor:
        """Noise predicted for each one's own latents and timestep."""
        return self.backend.predict_noise(self.latents(people), _timesteps(people), outputs)

    def attention(self, people: Sequence[int], outputs: Mapping[str, EncoderOutput]) -> dict[str, torch.Tensor]:
        """Cross-attention for the same."""
        return self.backend.cross_attention(self.latents(people), _timesteps(people), outputs)

    def latents(self, people: Sequence[int]) -> torch.Tensor:
        """Each one's own."""
        shape = self.backend.latent_shape()
        return torch.stack([torch.randn(shape, generator=generator_for(f"latents of {person}")) for person in people])

    def fill(self, people: Sequence[int], *, zero_b: bool = False) -> None:
        """Put a bank with these people's own weights in the slot."""
        self.slot.bank = personal_bank(self.layers, people, zero_b=zero_b)

    def check_encode(self, people: Sequence[int]) -> None:
        """Raises Broken for outputs of another shape or dtype than the contract's, or not finite."""
        for masked in (False, True):
            for encoder, output in self.encode(people, masked=masked).items():
                where = f"of {encoder}{' (masked)' if masked else ''}"
                for name, dimensions in _PARTS.items():
                    _check_part(f"{name} {where}", getattr(output, name, None), dimensions, len(people))

    def modules(self) -> dict[str, nn.Module]:
        """The torch modules that the backend's attributes hold, as far as they can be seen."""
        found: dict[str, nn.Module] = {}
        for name, value in getattr(self.backend, "__dict__", {}).items():
            values: Any = value.items() if isinstance(value, Mapping) else [("", value)]
            found |= {f"{name} {key}".strip(): one for key, one in values if isinstance(one, nn.Module)}
        return found

    def not_adapted(self) -> list[str]:
        """Layers without a bank layer in their place, as far as the backend's modules can be seen."""
        modules = [one for module in self.modules().values() for one in module.modules()]
        there = {one.key for one in modules if isinstance(one, BankLinear)}
        return [".".join(layer.key) for layer in self.layers if there and layer.key not in there]


def _timesteps(people: Sequence[int]) -> torch.Tensor:
    return torch.tensor([100 + 150 * person for person in people])


def _check_part(what: str, tensor: Any, dimensions: int, prompts: int) -> None:
    if not isinstance(tensor, torch.Tensor) or tensor.ndim != dimensions or len(tensor) != prompts:
        expected = "(prompts, length, width)" if dimensions == 3 else "(prompts, width)"
        raise Broken(f"{what} has {shape_of(tensor)} for {prompts} prompts; give {expected}")
    if tensor.dtype != torch.float32:
        raise Broken(f"{what} is {tensor.dtype}; give float32, whatever the weights' own dtype: .float()")
    if how := not_finite(tensor.detach()):
        raise Broken(f"{what} is {how}")


def check_same(one: Outputs, other: Outputs, message: str) -> None:
    """Raises Broken with the message, `%s` in it being the name of the first output that differs."""
    for name, tensor in one.items():
        if not same_bits(tensor, other[name]):
            raise Broken(message.replace("%s", f"{name}, by {relative(tensor, other[name]):.2g} of it"))


def compare_rows(one: Outputs, row: int, other: Outputs, other_row: int, when: str, *, exact: bool) -> None:
    """Raises Broken if a prompt's outputs differ; if not exact, by more than rounding explains."""
    for name, tensor in one.items():
        mine, theirs = tensor.detach()[row], other[name].detach()[other_row]
        share = relative(mine, theirs)
        if share > (0 if exact else VALUE_TOLERANCE):
            raise Broken(
                f"the {name} of prompt {row + 1} of 3 differs by {share:.2g} of it from what it is {when}; "
                "keep the first dimension (prompts) apart, and pad to one length whatever the other texts are"
            )
