"""Products with frozen weights: no gradient of a weight, and on a CPU the fastest of the routes PyTorch has.

On a CPU the products of a text's 77 rows are far from the rate the processor is capable of, unless they take the right
route; which that is depends on the number of rows and on the processor, never on a measurement, so that the same batch
gives the same bits. Weights are used as they lie in memory: packed copies would be faster still, and double it.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

MANY_ROWS = 768  # from here on MKL's route is the fastest
LARGE_WEIGHT = 2**18  # numbers; products with smaller ones are too short for the route to matter
_PADDED_TO = 16  # rows that narrow products are padded to a multiple of, where they are slow

_onednn = torch.ops.mkldnn
_scratch = threading.local()


class FrozenLinear(nn.Linear):
    """A linear layer whose weight and bias are never trained; its result and its input's gradient are the usual ones.

    On a CPU without arithmetic in the weight's 16-bit dtype, products are made in float32 and rounded to that dtype.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if input.device.type != "cpu" or weight.numel() < LARGE_WEIGHT or input.dtype != weight.dtype:
            return functional.linear(input, weight, self.bias)
        result: torch.Tensor = _Product.apply(input, weight, self.bias, False)  # type: ignore[no-untyped-call]
        return result


def freeze(model: nn.Module) -> nn.Module:
    """Make every plain linear layer of a model a `FrozenLinear`, in place, its parameters untouched."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FrozenLinear
    return model.requires_grad_(False)


class _Product(torch.autograd.Function):
    """x @ Wᵀ + bias, or x @ W; each is what the other's gradient is made by."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transpose: bool) -> Any:
        ctx.weight, ctx.transpose = weight, transpose  # shared by all steps, so not among what a step saves
        return _times(x, weight) if transpose else _times_transposed(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        gradient = _Product.apply(gradients[0], ctx.weight, None, not ctx.transpose)  # type: ignore[no-untyped-call]
        return gradient, None, None, None


def _times_transposed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x `(…, in)` @ Wᵀ + bias, `(…, out)`."""
    if not has_arithmetic(weight.dtype):
        wide = _times_transposed(x.float(), _widened(weight), None if bias is None else bias.float())
        return wide.to(x.dtype)
    if x.numel() < MANY_ROWS * x.shape[-1] and _has_onednn():
        result: torch.Tensor = _onednn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
        return result
    return functional.linear(x, weight, bias)


def _times(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x `(…, out)` @ W, `(…, in)`."""
    if not has_arithmetic(weight.dtype):
        return _times(x.float(), _widened(weight)).to(x.dtype)
    rows = x.numel() // x.shape[-1]
    if rows >= MANY_ROWS // 3 or weight.dtype is not torch.float32 or not _narrow_is_slow():
        return x @ weight
    columns = x.new_zeros(x.shape[-1], -(-rows // _PADDED_TO) * _PADDED_TO)
    columns[:, :rows] = x.reshape(rows, -1).t()
    result = x.new_empty(*x.shape[:-1], weight.shape[1])
    result.view(rows, -1).copy_((weight.t() @ columns)[:, :rows].t())
    return result


def _widened(weight: torch.Tensor) -> torch.Tensor:
    """The weight as float32, in memory that the next one of this thread overwrites."""
    buffer: torch.Tensor | None = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.numel() < weight.numel():
        buffer = _scratch.buffer = torch.empty(weight.numel())
    return buffer[: weight.numel()].view(weight.shape).copy_(weight)


@lru_cache
def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


@lru_cache
def _narrow_is_slow() -> bool:
    """Whether few rows @ W is slower here than Wᵀ @ few columns: with MKL on AMD's processors without AVX-512."""
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return amd and "AVX512" not in torch.backends.cpu.get_cpu_capability()


@lru_cache
def has_arithmetic(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies numbers of this dtype itself."""
    if dtype is torch.bfloat16:
        return bool(_onednn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(_onednn._is_mkldnn_fp16_supported())
    return True
