"""The optimizers, and their options where a short run shows what is peculiar to each."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from lora_forge_optimizers import lora_forge_optimizers

from lora_forge import OptimizerSpec

SPECS: dict[str, OptimizerSpec] = {spec.name: spec for spec in lora_forge_optimizers()}
TELLING: dict[str, dict[str, Any]] = {
    # Without the safeguard the estimate leaves its first value within a few steps.
    "prodigy": {"safeguard_warmup": False},
    "lion": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "adafactor": {"beta1": 0.9},
    # tiny_sdxl has no matrix of 4096 numbers.
    "adamw8bit": {"min_8bit_size": 1},
    "schedule_free_adamw": {"warmup": 2},
}
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
each = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_bitsandbytes if name == "adamw8bit" else ()) for name in SPECS]
)


def options(name: str, **values: Any) -> Any:
    """An optimizer's options."""
    return SPECS[name].options(**values)
