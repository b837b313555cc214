"""The blocks of a text encoder below its first adapted one: what they make of a text is computed once."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

_BLOCK = re.compile(r"\.layers\.(\d+)\.")


class Below:
    """Remembers, for token ids that are still alive, the hidden state that enters the first adapted block.

    adapted: the canonical names of the adapted layers; without any, all blocks but the last are below. That one always
    runs, since its input is an output of the encoder's own.
    """

    def __init__(self, encoder: nn.Module, adapted: Collection[str]) -> None:
        layers = (part for name, part in encoder.named_modules() if name.endswith("encoder.layers"))
        blocks: Any = next(layers, ())
        inside = [int(found.group(1)) for name in adapted if (found := _BLOCK.search(name))]
        self._blocks = list(blocks)[: max(0, min([*inside, len(blocks) - 1]))]
        self._known: Any = WeakTensorKeyDictionary()  # token ids: {masked: hidden state}
        self._of: dict[bool, torch.Tensor] | None = None
        self._masked = False
        for index, block in enumerate(self._blocks):
            block.forward = partial(self._forward, index, block.forward)

    @contextmanager
    def of(self, input_ids: torch.Tensor, *, masked: bool) -> Iterator[None]:
        """Within this, the encoder runs on these token ids, the very tensor."""
        if input_ids not in self._known:
            self._known[input_ids] = {}
        self._of, self._masked = self._known[input_ids], masked
        try:
            yield
        finally:
            self._of = None

    def _forward(self, index: int, forward: Any, hidden_states: torch.Tensor, *arguments: Any, **settings: Any) -> Any:
        if self._of is None:
            return forward(hidden_states, *arguments, **settings)
        last = index == len(self._blocks) - 1
        if self._masked in self._of:
            return self._of[self._masked] if last else hidden_states
        result = forward(hidden_states, *arguments, **settings)
        if last:
            self._of[self._masked] = result
        return result

    def release(self) -> None:
        """Leave the blocks as they were found."""
        for block in self._blocks:
            del block.forward
