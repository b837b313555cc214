"""The bank: LoRA layers with a leading prompts dimension, trained side by side in one forward pass.

All A and B of a bank are views of one float32 buffer `(prompts, numbers)`, and their gradients views
of another. So the optimizer, L2 and anything done per prompt are a handful of operations on one
tensor, however many layers there are; and layers whose component is not loaded are stepped by exactly
the same arithmetic as all others.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_forge.contracts import LayerKey, LoraWeights, TargetLayer
from lora_forge.errors import ModelError
from lora_forge.frozen import has_arithmetic

CACHED_NUMBERS = 2**17  # what a CPU does number by number, it does fastest while they are in its caches


class Pair(NamedTuple):
    """One layer's matrices: A `(prompts, rank, in)`, B `(prompts, out, rank)`, leaves with gradients until `rest`."""

    lora_A: torch.Tensor
    lora_B: torch.Tensor


class Bank:
    """LoRA weights of `prompts` prompts over the same target layers.

    rank, alpha: the same for every layer; ΔW = alpha / rank · B @ A.
    parameter: `(prompts, numbers)` float32, the buffer that all pairs are views of; so is its gradient.
    """

    def __init__(
        self, layers: Sequence[TargetLayer], *, rank: int, alpha: float, prompts: int, device: str = "cpu"
    ) -> None:
        self.layers = {layer.key: layer for layer in layers}
        self.rank, self.alpha, self.prompts = rank, alpha, prompts
        self.scale = alpha / rank
        numbers = sum(rank * (layer.in_features + layer.out_features) for layer in layers)
        self.parameter = nn.Parameter(torch.zeros(prompts, numbers, device=device))
        self._gradient = torch.zeros_like(self.parameter)
        self.parameter.grad = self._gradient
        self._rows: list[tuple[nn.Parameter, torch.Tensor]] = []
        self.pairs: dict[LayerKey, Pair] = {}
        self._columns: dict[str, list[tuple[int, int]]] = {}
        start = 0
        for layer in layers:
            first = start
            lora_a, start = self._view(start, rank, layer.in_features)
            lora_b, start = self._view(start, layer.out_features, rank)
            self.pairs[layer.key] = Pair(lora_a, lora_b)
            columns = self._columns.setdefault(layer.component, [])
            if columns and columns[-1][1] == first:
                first = columns.pop()[0]
            columns.append((first, start))

    def _view(self, start: int, rows: int, columns: int) -> tuple[torch.Tensor, int]:
        stop = start + rows * columns
        shape = (self.prompts, rows, columns)
        view = self.parameter.data[:, start:stop].view(shape).requires_grad_()
        view.grad = self._gradient[:, start:stop].view(shape)
        return view, stop

    @property
    def gradient(self) -> torch.Tensor:
        """`(prompts, numbers)`, the buffer that every pair's gradient is a view of."""
        return self._gradient

    def fill(self, weights: LoraWeights) -> None:
        """Copy LoRA weights in (shapes as the pairs'), and check that they arrived.

        Raises ModelError naming a layer that is missing, has another shape, or is not finite.
        """
        with torch.no_grad():
            for (component, layer), pair in self.pairs.items():
                given = weights.get(component, {}).get(layer)
                if given is None:
                    raise ModelError(f"no initial weights for {component}.{layer}")
                for name, target in pair._asdict().items():
                    value = given[name]
                    if value.shape != target.shape:
                        raise ModelError(
                            f"initial {name} of {component}.{layer} has shape {tuple(value.shape)}, "
                            f"expected {tuple(target.shape)}"
                        )
                    target.copy_(value)
        if not bool(self.parameter.isfinite().all()):
            raise ModelError("initial weights are not finite")

    def adapt(self, key: LayerKey, result: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """What layer `key` puts out: `result` `(prompts · k, …, out)` of the frozen one, plus each prompt's own term.

        hidden: the layer's input, `(prompts · k, …, in)`.
        """
        lora_a, lora_b = self.pairs[key]
        adapted: torch.Tensor = _AddLowRank.apply(result, hidden, lora_a, lora_b, self.scale)  # type: ignore[no-untyped-call]
        return adapted

    def place(self, weights: LoraWeights) -> None:
        """Copy in weights of some of the layers, shapes as the pairs' or one prompt's for all."""
        with torch.no_grad():
            for component, layers in weights.items():
                for layer, pair in layers.items():
                    for name, target in self.pairs[component, layer]._asdict().items():
                        target.copy_(pair[name])

    def rest(self) -> None:
        """Training is over: let go of the gradient, and of the device in one copy. What is left is there to be read."""
        numbers = self.parameter.detach().cpu()
        for key, pair in self.pairs.items():
            views = (numbers.as_strided(part.shape, part.stride(), part.storage_offset()) for part in pair)
            self.pairs[key] = Pair(*views)
        self.parameter, self._gradient = nn.Parameter(numbers, requires_grad=False), torch.empty(0)
        self._rows.clear()

    def zero_gradient(self) -> None:
        """Clear the gradient."""
        self._gradient.zero_()

    def attach_gradient(self) -> None:
        """Put the gradient back in place, should an optimizer have taken it away."""
        self.parameter.grad = self._gradient
        for row, gradient in self._rows:
            row.grad = gradient

    def add_l2(self, strength: float) -> torch.Tensor:
        """L2 of each prompt, `strength · sum(p²)`, shape `(prompts,)`; its gradient is added to the bank's.

        The gradient `2 · strength · p` is added in one operation instead of through autograd.
        """
        with torch.no_grad():
            self.gradient.add_(self.parameter, alpha=2 * strength)
        return self.l2(strength)

    def l2(self, strength: float) -> torch.Tensor:
        """L2 of each prompt, shape `(prompts,)`."""
        return strength * _sum_of_squares(self.parameter.detach())

    def gradient_norms(self) -> dict[str, torch.Tensor]:
        """Euclidean norm of each component's gradient as it is now, `(prompts,)`."""
        return {
            component: torch.stack([_sum_of_squares(self._gradient[:, a:b]) for a, b in columns]).sum(dim=0).sqrt()
            for component, columns in self._columns.items()
        }

    def weights(self, prompt: int) -> LoraWeights:
        """One prompt's LoRA weights, without the prompts dimension, copied to the CPU."""
        result: LoraWeights = {}
        for (component, layer), pair in self.pairs.items():
            result.setdefault(component, {})[layer] = {
                name: tensor.detach()[prompt].to("cpu", copy=True) for name, tensor in pair._asdict().items()
            }
        return result

    def rows(self, prompt: int) -> list[nn.Parameter]:
        """One prompt's matrices as parameters of their own (views), for optimizers that are not elementwise."""
        parameters = []
        for pair in self.pairs.values():
            for tensor in pair:
                assert tensor.grad is not None
                row = nn.Parameter(tensor.detach()[prompt])
                row.grad = tensor.grad[prompt]
                self._rows.append((row, row.grad))
                parameters.append(row)
        return parameters

    def scale_result(self, factors: torch.Tensor) -> None:
        """Multiply each prompt's ΔW by a factor, shape `(prompts,)`, by scaling its B."""
        with torch.no_grad():
            for pair in self.pairs.values():
                pair.lora_B.mul_(factors.to(pair.lora_B.device).view(-1, 1, 1))

    def delta_norms(self) -> dict[LayerKey, torch.Tensor]:
        """Frobenius norm of each layer's ΔW, `(prompts,)` float64 on the CPU, from the two r × r Gram matrices."""
        norms = {}
        with torch.no_grad():
            for key, pair in self.pairs.items():
                a, b = pair.lora_A.cpu().double(), pair.lora_B.cpu().double()  # double: not every device has it
                squared = ((a @ a.transpose(1, 2)) * (b.transpose(1, 2) @ b)).sum(dim=(1, 2))
                norms[key] = self.scale * squared.clamp_min(0).sqrt()
        return norms


def _sum_of_squares(numbers: torch.Tensor) -> torch.Tensor:
    """Of each row of `(prompts, numbers)`; on a CPU by pieces that stay in its caches."""
    if numbers.device.type != "cpu":
        return numbers.square().sum(dim=1)
    sums, square = torch.zeros(len(numbers)), torch.empty(min(CACHED_NUMBERS, numbers.shape[1]))
    for row, total in zip(numbers, sums, strict=True):
        for piece in row.split(CACHED_NUMBERS):
            total += torch.square(piece, out=square[: len(piece)]).sum()
    return sums


class BankSlot:
    """Where injected layers find the bank of the moment; without one, or frozen, they add nothing."""

    def __init__(self) -> None:
        self.bank: Bank | None = None
        self.active = True

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within this, the model is the frozen one."""
        before, self.active = self.active, False
        try:
            yield
        finally:
            self.active = before


class BankLinear(nn.Module):
    """A frozen linear layer plus each prompt's own low-rank term.

    Rows come in prompts-major order: the first dimension of the input is `prompts · k`. The low-rank
    term is computed and added in float32, and the sum rounded to the layer's own dtype, as PEFT does;
    on a CPU that has arithmetic in the layer's 16-bit dtype, in that.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **_: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.slot = BankSlot()
        self.key = ("", "")

    def get_base_layer(self) -> nn.Module:
        """The frozen layer; PEFT puts it back by this name."""
        return self.base_layer

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.base_layer(hidden)
        bank = self.slot.bank
        if bank is None or not self.slot.active:
            return result
        return bank.adapt(self.key, result, hidden)


class _AddLowRank(torch.autograd.Function):
    """result + scale · B A x of each prompt: one node of the graph, which keeps x in its own dtype, instead of ten.

    result `(prompts · k, …, out)`, hidden `(prompts · k, …, in)`, A `(prompts, rank, in)`, B `(prompts, out, rank)`.
    On a CPU gradients with rank rows are made two to three times as fast as the same ones with rank columns, and a
    layer's result, which nobody else has, is added to in place.
    """

    @staticmethod
    def forward(
        ctx: Any, result: torch.Tensor, hidden: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scale: float
    ) -> torch.Tensor:
        dtype = _low_rank_dtype(hidden)
        inner = torch.bmm(_rows(hidden, lora_a, dtype), lora_a.to(dtype).transpose(1, 2))  # as PEFT has it
        ctx.save_for_backward(hidden, lora_a, lora_b)
        ctx.inner, ctx.scale = inner, scale
        b = lora_b.to(dtype).transpose(1, 2)
        if result.dtype is dtype and result.device.type == "cpu" and result.is_contiguous() and not result._is_view():
            ctx.mark_dirty(result)
            _rows(result, lora_b, dtype).baddbmm_(inner, b, alpha=scale)
            return result
        total = torch.empty_like(result, dtype=dtype, memory_format=torch.contiguous_format)
        torch.baddbmm(_rows(result, lora_b, dtype), inner, b, alpha=scale, out=_rows(total, lora_b, dtype))
        return total.to(result.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        hidden, lora_a, lora_b = ctx.saved_tensors
        dtype = _low_rank_dtype(hidden)
        a, b = lora_a.to(dtype), lora_b.to(dtype)
        gradient, rows = _rows(gradients[0], lora_b, dtype), _rows(hidden, lora_a, dtype)
        # Where the gradient is to be differentiated in turn, `inner` has to be part of its graph.
        inner = torch.bmm(rows, a.transpose(1, 2)) if torch.is_grad_enabled() else ctx.inner
        of_b = torch.bmm((inner * ctx.scale).transpose(1, 2), gradient).transpose(1, 2).float()
        of_inner = torch.bmm(b.transpose(1, 2), gradient.transpose(1, 2)) * ctx.scale
        of_a = torch.bmm(of_inner, rows).float()
        of_hidden = None
        if ctx.needs_input_grad[1]:
            of_hidden = torch.bmm(of_inner.transpose(1, 2), a).view(hidden.shape).to(hidden.dtype)
        return gradients[0], of_hidden, of_a, of_b, None


def _low_rank_dtype(hidden: torch.Tensor) -> torch.dtype:
    """What the low-rank term is computed in: float32, as PEFT has it; on a CPU with arithmetic in the activations' own
    dtype that one, which spares six conversions of all activations, most of what a step takes beside the products.
    """
    return hidden.dtype if hidden.device.type == "cpu" and has_arithmetic(hidden.dtype) else torch.float32


def _rows(tensor: torch.Tensor, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`(prompts, rows of each, width)`; as many prompts as `like` has."""
    return tensor.reshape(len(like), -1, tensor.shape[-1]).to(dtype)


def inject(model: nn.Module, names: Mapping[str, LayerKey], rank: int, alpha: float, slot: BankSlot) -> Any:
    """Have PEFT put a `BankLinear` in place of each named linear layer of a frozen model.

    names: the module path in this model, to the key of its pair in the bank.
    Returns the PeftModel; its `unload()` restores the layers. Raises ModelError if a layer is not a
    plain linear layer.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(names))
    config._register_custom_module({nn.Linear: BankLinear})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for an attribute by its old name
        adapted = get_peft_model(model, config)
    for name, key in names.items():
        layer = model.get_submodule(name)
        if not isinstance(layer, BankLinear):
            raise ModelError(f"{key[0]}.{key[1]} is a {type(layer).__name__}, not a plain linear layer")
        layer.slot, layer.key = slot, key
    return adapted
