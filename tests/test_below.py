"""Where all target layers lie in upper blocks, what those below make of a text is computed once, and is the same."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_forge
from lora_forge.clip_unet import backend
from lora_forge.clip_unet.below import Below
from lora_forge.config.model import shipped_folder
from lora_forge.result import RunResult


class Nothing:
    """Remembers nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def of(self, *_: Any, **__: Any) -> Any:
        return nullcontext()

    def release(self) -> None:
        pass


@pytest.fixture
def upper(model: str, tmp_path: Path) -> Path:
    """A model config whose target layers in text encoders are those of the last block."""
    config = json.loads((shipped_folder() / f"{model}_config.json").read_text(encoding="utf-8"))
    for key in [key for key in config if "text_encoder" in key]:
        values = config[key]
        last = max(int(name.split(".")[3]) for name in values)
        kept = [name for name in values if int(name.split(".")[3]) == last]
        config[key] = kept if isinstance(values, list) else {name: values[name] for name in kept}
    path = tmp_path / "upper_config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def run(config: Path | str, prompt: str = "an owl", **settings: Any) -> RunResult:
    return lora_forge.run(prompt, str(config), iterations=5, **settings)


def assert_equal(one: RunResult, other: RunResult) -> None:
    assert one.steps == other.steps
    assert one.effect == other.effect
    for component, layers in one.weights.items():
        for layer, pair in layers.items():
            assert torch.equal(pair["lora_B"], other.weights[component][layer]["lora_B"]), (component, layer)


def test_the_run_is_the_same_to_the_bit(upper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remembered = run(upper, strength=2.0)
    monkeypatch.setattr(backend, "Below", Nothing)
    assert_equal(remembered, run(upper, strength=2.0))


def test_a_block_below_runs_once_for_each_text_and_mask_however_many_steps_there_are(
    upper: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()

    class Counting(Below):
        def __init__(self, encoder: Any, adapted: Any) -> None:
            for name, part in encoder.named_modules():
                if name.endswith(("layers.0.mlp.fc1", f"layers.{len(encoder_blocks(encoder)) - 1}.mlp.fc1")):
                    part.register_forward_hook(lambda *_, where=name: calls.update([where]))
            super().__init__(encoder, adapted)

    def encoder_blocks(encoder: Any) -> Any:
        return next(part for name, part in encoder.named_modules() if name.endswith("encoder.layers"))

    monkeypatch.setattr(backend, "Below", Counting)
    run(upper)
    below = {name: count for name, count in calls.items() if "layers.0." in name}
    above = {name: count for name, count in calls.items() if "layers.0." not in name}
    assert max(below.values()) <= 2 * len({name for name in calls if "layers.0." in name})  # masked, and unmasked
    assert min(above.values()) > 5


def test_prompts_of_a_session_do_not_remember_each_other(upper: Path) -> None:
    with lora_forge.load(str(upper)) as session:
        results = [session.run(prompt, iterations=5) for prompt in ("an owl", "a fox", "an owl")]
    assert_equal(results[0], results[2])
    assert_equal(results[1], run(upper, "a fox"))


def test_a_model_in_memory_is_left_with_the_blocks_it_had(upper: Path, model_folder: Path, family: Any) -> None:
    import diffusers

    pipe = getattr(diffusers, family.pipeline).from_pretrained(model_folder, dtype=torch.float32)
    before = [module for module in pipe.text_encoder.modules() if "forward" in vars(module)]
    lora_forge.run("an owl", str(upper), iterations=2, pipeline=pipe)
    assert [module for module in pipe.text_encoder.modules() if "forward" in vars(module)] == before
