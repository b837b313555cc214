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

NOISE = """
import torch
from lora_forge import LossSpec, hookimpl

def noise(batch):
    latents = torch.ones(batch.prompts, *batch.latent_shape)
    timesteps = torch.full((batch.prompts,), 500)
    return -batch.predict_noise(latents, timesteps, batch.adapted(), adapted=True).square().mean((1, 2, 3))

@hookimpl
def lora_forge_losses():
    yield LossSpec(name="noise", summary="a larger prediction", needs={"text", "noise_prediction"}, factory=noise)
"""


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


def of_unet(model: str, folder: Path) -> str:
    """A model config whose target layers are those of the UNet alone."""
    config = json.loads((shipped_folder() / f"{model}_config.json").read_text(encoding="utf-8"))
    path = folder / "unet_config.json"
    path.write_text(json.dumps({key: value for key, value in config.items() if "text_encoder" not in key}))
    return str(path)


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


def test_of_an_encoder_without_target_layers_all_blocks_but_the_last_run_once(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, plugin = of_unet(model, tmp_path), tmp_path / "noise.py"
    plugin.write_text(NOISE, encoding="utf-8")
    calls: Counter[int] = Counter()

    class Counting(Below):
        def __init__(self, encoder: Any, adapted: Any) -> None:
            first = next(part for name, part in encoder.named_modules() if name.endswith("layers.0.mlp.fc1"))
            first.register_forward_hook(lambda *_: calls.update([id(encoder)]))
            super().__init__(encoder, adapted)

    monkeypatch.setattr(backend, "Below", Counting)
    remembered = run(path, loss="noise", plugins=[plugin])
    assert remembered.loss_after < remembered.loss_before
    assert calls
    assert max(calls.values()) <= 2  # masked, and unmasked
    monkeypatch.setattr(backend, "Below", Nothing)
    assert_equal(remembered, run(path, loss="noise", plugins=[plugin]))


def test_a_model_in_memory_is_left_with_the_blocks_of_an_encoder_without_target_layers(
    model: str, model_folder: Path, family: Any, tmp_path: Path
) -> None:
    import diffusers

    pipe = getattr(diffusers, family.pipeline).from_pretrained(model_folder, dtype=torch.float32)
    plugin = tmp_path / "noise.py"
    plugin.write_text(NOISE, encoding="utf-8")
    lora_forge.run("an owl", of_unet(model, tmp_path), iterations=2, pipeline=pipe, loss="noise", plugins=[plugin])
    assert not [module for module in pipe.text_encoder.modules() if "forward" in vars(module)]


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
