"""An executor for lora-forge: the batches of a job on a Ray cluster.

This module imports no Ray: the factory, named as a string, does.
"""

from __future__ import annotations

from collections.abc import Iterator

__lora_forge_api__ = 1

from lora_forge import ExecutorSpec, hookimpl
from lora_forge_ray.options import Options


@hookimpl
def lora_forge_executors() -> Iterator[ExecutorSpec]:
    yield ExecutorSpec(
        name="ray",
        summary="on the GPUs or processors of a Ray cluster; a batch whose worker dies runs again on another",
        options=Options,
        factory="lora_forge_ray.executor:execute",
    )
