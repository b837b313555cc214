"""The objective's gradient with respect to ΔW before the first step, for initializers that ask for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from lora_forge.bank import Bank
from lora_forge.batch import ModelView
from lora_forge.contracts import LayerGradient, LayerKey, LoraWeights
from lora_forge.errors import blaming
from lora_forge.training.objective import Objective, backward

Gradients = Mapping[LayerKey, Sequence[LayerGradient | None]]  # per prompt; None where it is not finite


class RecordingBank(Bank):
    """A bank in which a backward pass notes what goes into each layer, and the gradient that arrives at its output.

    It starts with every A and B zero, so that the model is the frozen one.
    """

    def __init__(self, like: Bank) -> None:
        layers, device = list(like.layers.values()), str(like.parameter.device)
        super().__init__(layers, rank=like.rank, alpha=like.alpha, prompts=like.prompts, device=device)
        self._noted: dict[LayerKey, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def adapt(self, key: LayerKey, result: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        adapted = super().adapt(key, result, hidden)
        sign = math.copysign(1.0, self.scale)  # below 0 where the loss looks at the model with -ΔW in it
        noted: torch.Tensor = _Noted.apply(adapted, hidden, partial(self._note, key, sign))  # type: ignore[no-untyped-call]
        return noted

    def _note(self, key: LayerKey, sign: float, hidden: torch.Tensor, gradient: torch.Tensor) -> None:
        inputs, outputs = (one.detach().reshape(self.prompts, -1, one.shape[-1]) for one in (hidden, gradient))
        # A copy of the gradient, since autograd may add to the tensor it gave; nothing writes to the input any more.
        copy = outputs.to("cpu", torch.float32, copy=True).mul_(sign)
        self._noted.setdefault(key, []).append((copy, inputs.to("cpu", torch.float32)))

    def gradients(self) -> Gradients:
        """Of the layers that a gradient arrived at."""
        return {key: [_gradient(noted, prompt) for prompt in range(self.prompts)] for key, noted in self._noted.items()}


class _Noted(torch.autograd.Function):
    """A copy of a layer's output; when its gradient is known, `note` is called with the layer's input and with that.

    It is autograd that keeps the input, so that gradient checkpointing can drop it and make it again.
    """

    @staticmethod
    def forward(ctx: Any, adapted: torch.Tensor, hidden: torch.Tensor, note: Any) -> torch.Tensor:
        ctx.save_for_backward(hidden)
        ctx.note = note
        return adapted.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (hidden,) = ctx.saved_tensors
        ctx.note(hidden, gradients[0])
        return gradients[0], None, None


def first_gradients(bank: Bank, earlier: LoraWeights, view: ModelView, objective: Objective) -> Gradients:
    """The objective's gradient, whatever its terms' schedules, where every B is zero but those that `earlier` holds.

    bank: says which layers, and of what sizes. earlier: one prompt's weights, which all prompts start with.
    view, objective: made for this alone, so that neither the steps' noise nor losses that count steps differ from
    those of a run that never asked.
    """
    recording = RecordingBank(bank)
    recording.place(earlier)
    view.slot.bank = recording
    try:
        view.begin_step()
        total = objective.total(objective.values())
        if total.requires_grad:  # if it does not, the first step says so
            with blaming("the objective's gradient"):
                backward(total)
    finally:
        view.slot.bank = None
    return recording.gradients()


def _gradient(noted: Sequence[tuple[torch.Tensor, torch.Tensor]], prompt: int) -> LayerGradient | None:
    """One prompt's, of all uses of a layer; None where it is not finite, which the first step finds out of the loss."""
    outputs, inputs = (torch.cat([use[prompt] for use in uses]) for uses in zip(*noted, strict=True))
    finite = bool(outputs.isfinite().all()) and bool(inputs.isfinite().all())
    return LayerGradient(outputs, inputs) if finite else None
