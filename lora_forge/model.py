"""A base model opened for a plan: its backend, the layers that get a LoRA, and the slot the bank goes in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lora_forge.bank import BankSlot
from lora_forge.clock import Clock
from lora_forge.config.model import expand_targets
from lora_forge.contracts import Backend, BackendRequest, TargetLayer
from lora_forge.errors import ModelError, blaming
from lora_forge.plan import Plan


class LoadedModel:
    """Opened by `open_model`; loads components when a plan first needs them, and adapts them once."""

    def __init__(self, backend: Backend, device: str) -> None:
        self.backend, self.device = backend, device
        self.slot = BankSlot()
        self.layers: Sequence[TargetLayer] = ()
        self._adapted: set[str] = set()

    def check(self, plan: Plan) -> None:
        """Check that weight files not yet loaded are whole, and target layers against the architecture."""
        if plan.config.preview:
            if type(self.backend).pipeline is Backend.pipeline:
                raise ModelError(f"backend {plan.backend.name!r} makes no images, so there is no preview")
            self.backend.check_files(plan.backend_spec.components)
        self.backend.check_files(self._fresh(plan))
        self.layers = expand_targets(plan.model, self.backend.architecture(), rank=plan.rank)

    @contextmanager
    def use(self, plan: Plan, clock: Clock) -> Iterator[None]:
        """Have what the plan needs loaded and adapted; afterwards no bank is left in the slot."""
        fresh = self._fresh(plan)
        with clock.phase("load"), blaming(f"backend {plan.backend.name!r}"):
            self.backend.load(fresh)
            for component in fresh:
                layers = [layer for layer in self.layers if layer.component == component]
                self.backend.adapt(layers, plan.rank, plan.alpha, self.slot)
                self._adapted.add(component)
        import torch

        matmul = torch.backends.cuda.matmul
        before, matmul.allow_tf32 = matmul.allow_tf32, plan.config.tf32
        try:
            yield
        finally:
            self.slot.bank, matmul.allow_tf32 = None, before

    def _fresh(self, plan: Plan) -> list[str]:
        """What the plan needs and is not loaded yet."""
        return [component for component in plan.load if component not in self._adapted]

    def close(self) -> None:
        """Leave the components as they were found."""
        self.backend.release()
        self._adapted.clear()


def open_model(plan: Plan, *, pipeline: Any = None) -> LoadedModel:
    """Open the base model of a plan and check it, without reading weights.

    Raises ModelError for an absent device or a model that is not whole, ConfigError for target layers
    that do not fit it.
    """
    device = resolve_device(plan.config.device) if pipeline is None else str(getattr(pipeline, "device", "cpu"))
    request = BackendRequest(plan.base_model, device, plan.config.dtype, pipeline)
    with blaming(f"backend {plan.backend.name!r}"):
        model = LoadedModel(plan.backend.build()(request), device)
    model.check(plan)
    return model


def resolve_device(name: str) -> str:
    """`auto` as the best device there is. Raises ModelError when the device asked for is absent."""
    import torch

    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(kind for kind in ("cuda", "mps", "cpu") if present[kind])
    kind, _, index = name.partition(":")
    if not present[kind] or (index and int(index) >= torch.cuda.device_count()):
        raise ModelError(f"device: {name!r} was asked for, but PyTorch sees no such device here")
    return name
