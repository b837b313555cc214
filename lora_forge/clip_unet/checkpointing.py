"""Gradient checkpointing: activations are recomputed in the backward pass instead of kept, block by block.

Source: Chen et al., Training Deep Nets with Sublinear Memory Cost (arXiv:1604.06174). torch recomputes with the model
as it is then; here the model is, for that while, what it was in the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_forge.bank import Bank, BankSlot
from lora_forge.clip_unet.attention_maps import kept_maps


class Checkpointing:
    """What diffusers is given as `gradient_checkpointing_func`.

    slot: where the bank of the moment is. keeps_maps: whether the UNet's cross-attention is being kept, by one who
    entered `kept_maps`.
    """

    def __init__(self) -> None:
        self.slot: BankSlot | None = None
        self.keeps_maps = False

    def __call__(self, module: nn.Module, *arguments: Any) -> Any:
        bank = self.slot.bank if self.slot else None
        as_now = partial(self._as_now, module, bank, bank.scale if bank else 0.0, self.keeps_maps)
        runs = 0

        def block(*inputs: Any) -> Any:
            nonlocal runs
            runs += 1
            with as_now() if runs > 1 else nullcontext():
                return module(*inputs)

        # Nothing is drawn: what is frozen is in eval mode.
        return checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)

    @staticmethod
    @contextmanager
    def _as_now(module: nn.Module, bank: Bank | None, scale: float, keeps_maps: bool) -> Iterator[None]:
        before = bank.scale if bank else 0.0
        if bank:
            bank.scale = scale
        try:
            with kept_maps(module, {}) if keeps_maps else nullcontext():
                yield
        finally:
            if bank:
                bank.scale = before
