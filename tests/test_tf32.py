"""`--tf32`: what PyTorch is told while steps run, and what it is left with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lora_forge

PLUGIN = """
import torch
from lora_forge import LossSpec, hookimpl

def loss(batch):
    size = sum(out.last_hidden_state.square().mean((1, 2)) for out in batch.adapted().values())
    return size * 0 + size / size.detach() * (2.0 if torch.backends.cuda.matmul.allow_tf32 else 1.0)

@hookimpl
def lora_forge_losses():
    yield LossSpec(name="told", summary="2 where tf32 is allowed, 1 elsewhere", factory=loss)
"""


@pytest.fixture(params=[False, True])
def before(request: pytest.FixtureRequest) -> Iterator[bool]:
    """What is set when a run starts."""
    matmul = torch.backends.cuda.matmul
    found, matmul.allow_tf32 = matmul.allow_tf32, request.param
    yield bool(request.param)
    matmul.allow_tf32 = found


@pytest.mark.parametrize("asked", [False, True])
def test_it_holds_while_steps_run_and_what_was_set_before_is_back_afterwards(
    tmp_path: Path, before: bool, asked: bool
) -> None:
    plugin = tmp_path / "told.py"
    plugin.write_text(PLUGIN, encoding="utf-8")
    result = lora_forge.run("an owl", "tiny_sdxl", iterations=2, loss="told", plugins=[plugin], tf32=asked, l2=0)
    assert [step.terms["told"] for step in result.steps] == [2.0 if asked else 1.0] * 2
    assert torch.backends.cuda.matmul.allow_tf32 is before
