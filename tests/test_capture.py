"""A step that is recorded once and replayed: the same numbers as one that is not, and only where that is right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lora_forge
from lora_forge.clock import Clock
from lora_forge.config.run import read_run_config
from lora_forge.model import open_model
from lora_forge.plan import Request, make_plan
from lora_forge.plugins import discover
from lora_forge.result import RunResult
from lora_forge.runner import forge
from lora_forge.training import train as training
from lora_forge.training.capture import WARM_UP, Captured
from lora_forge.training.steps import StepNumbers

PLUGIN = """
from lora_forge import LossSpec, hookimpl

def noisy(batch):
    return sum((out.pooled * batch.randn("noise", out.pooled.shape[1])).mean(1) for out in batch.adapted().values())

@hookimpl
def lora_forge_losses():
    yield LossSpec(name="noisy", summary="", factory=noisy)
"""


class Recorder:
    """Stands for CUDA: replays by doing the work again into the tensors of the first time."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, device: str, function: Callable[[], StepNumbers]) -> tuple[Callable[[], None], StepNumbers]:
        self.captures += 1
        kept = function()

        def replay() -> None:
            self.replays += 1
            new = function()
            kept.total.copy_(new.total)
            kept.l2.copy_(new.l2)
            for now, then in ((new.terms, kept.terms), (new.norms, kept.norms)):
                for name, value in now.items():
                    then[name].copy_(value)

        return replay, kept


def forged(loss: str = "embedding_magnitude", plugins: tuple[Path, ...] = ()) -> RunResult:
    registry = discover(list(plugins))
    settings = {"prompt": "an owl", "model": "tiny_sdxl", "iterations": 8, "loss": loss}
    plan = make_plan(read_run_config([settings]), registry)
    (result,) = forge(plan, [Request("an owl", None, 0, None)], open_model(plan), registry, Clock())
    return result


def test_a_replayed_step_gives_the_numbers_of_every_step_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, recorder = forged(), Recorder()
    monkeypatch.setattr(training, "cuda_capture", recorder)
    monkeypatch.setattr(training, "_capturable", lambda *_: True)
    replayed = forged()
    assert (recorder.captures, recorder.replays) == (1, 8 - WARM_UP)
    assert replayed.steps == plain.steps
    for layer, pair in plain.weights["text_encoder"].items():
        assert torch.equal(replayed.weights["text_encoder"][layer]["lora_B"], pair["lora_B"])


def test_only_losses_that_say_so_are_captured_and_only_on_cuda(tmp_path: Path) -> None:
    plugin = tmp_path / "noisy.py"
    plugin.write_text(PLUGIN)
    registry = discover([plugin])
    for loss, device, expected in (
        ("embedding_magnitude", "cuda", True),
        ("embedding_magnitude", "cpu", False),
        (["embedding_magnitude", "noisy"], "cuda:1", False),
    ):
        plan = make_plan(read_run_config([{"prompt": "an owl", "model": "tiny_sdxl", "loss": loss}]), registry)
        model = open_model(plan)
        model.device = device
        assert training._capturable(plan, model) is expected


def test_what_cannot_be_captured_is_told_and_done_step_by_step() -> None:
    def refuse(_: Callable[[], int]) -> tuple[Callable[[], None], int]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    notes: list[str] = []
    calls = iter(range(100))
    step = Captured(lambda: next(calls), refuse, notes.append)
    assert [step() for _ in range(6)] == list(range(6))
    assert notes == ["steps run one operation at a time: operation not permitted when stream is capturing"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_captured_run_is_that_of_a_cpu_up_to_rounding() -> None:
    runs = [lora_forge.run("an owl", "tiny_sdxl", iterations=WARM_UP + 8, device=name) for name in ("cuda", "cpu")]
    assert not [note for note in runs[0].warnings if "one operation at a time" in note]
    losses = [[step.loss for step in result.steps] for result in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
