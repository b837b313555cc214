"""`pipeline=pipe`: a run on a pipeline already in memory equals one from the folder, and leaves no trace in it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_reader import load_whole, open_pipeline

import lora_forge
from lora_forge.clip_unet.family import Family
from lora_forge.errors import ModelError, RunFailed, UsageError

PROMPT = "a steampunk owl"
LOSSES = """
import torch
from lora_forge import LossSpec, hookimpl

def noise(batch):
    latents = torch.ones((batch.prompts, *batch.latent_shape))
    predicted = batch.predict_noise(latents, torch.full((batch.prompts,), 500), batch.adapted(), adapted=True)
    return predicted.square().mean((1, 2, 3))

def broken(batch):
    batch.adapted()
    raise RuntimeError("no more")

@hookimpl
def lora_forge_losses():
    yield LossSpec(name="noise", summary="small noise", needs={"text", "noise_prediction"}, factory=noise)
    yield LossSpec(name="broken", summary="raises", needs={"text"}, factory=broken)
"""


@pytest.fixture
def pipe(family: Family, model_folder: Path) -> Any:
    """A pipeline that has been used, with flags set here and there as its owner may have left them."""
    pipe = open_pipeline(family.name, model_folder)
    with torch.no_grad():  # the first time hidden states are asked for, transformers hooks its modules for good
        for encoder in family.encoders:
            getattr(pipe, encoder)(torch.zeros(1, 77, dtype=torch.long), output_hidden_states=True)
    encoded(pipe)
    last = getattr(pipe, list(family.encoders)[-1])
    if last is not pipe.text_encoder:
        pipe.text_encoder.requires_grad_(False)
    last.train()
    first, *others = [module for name, module in last.named_modules() if name.endswith("self_attn")]
    first.eval()
    others[-1].requires_grad_(False)
    pipe.unet.mid_block.train()
    return pipe


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugin") / "in_memory_losses.py"
    path.write_text(LOSSES)
    return path


def encoded(pipe: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        made = pipe.encode_prompt(PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
        return [tensor for tensor in made if tensor is not None]


def modules(pipe: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def state(pipe: Any) -> dict[tuple[str, str], Any]:
    """Everything there is to see of the pipeline's modules, parameters and buffers, but their numbers."""
    seen: dict[tuple[str, str], Any] = {}
    for component, model in modules(pipe).items():
        for name, module in model.named_modules():
            hooks = {key: len(value) for key, value in vars(module).items() if key.endswith("_hooks")}
            seen[component, f"module {name}"] = (id(module), type(module), module.training, sorted(vars(module)), hooks)
        for name, parameter in model.named_parameters():
            seen[component, f"parameter {name}"] = (id(parameter), parameter.requires_grad, parameter.grad)
        seen[component, "keys"] = list(model.state_dict())
    return seen


def numbers(pipe: Any) -> dict[tuple[str, str], torch.Tensor]:
    return {(c, name): value.clone() for c, part in modules(pipe).items() for name, value in part.state_dict().items()}


def assert_untouched(pipe: Any, before: tuple[Any, Any, Any]) -> None:
    seen, values, outputs = before
    assert state(pipe) == seen
    assert not any("peft" in key or "lora" in key for part in modules(pipe).values() for key in vars(part))
    now = numbers(pipe)
    assert now.keys() == values.keys()
    assert all(torch.equal(now[key], value) for key, value in values.items())
    assert all(torch.equal(one, other) for one, other in zip(encoded(pipe), outputs, strict=True))


def snapshot(pipe: Any) -> tuple[Any, Any, Any]:
    return state(pipe), numbers(pipe), encoded(pipe)


def assert_equal_runs(one: lora_forge.RunResult, other: lora_forge.RunResult) -> None:
    assert [step.loss for step in one.steps] == [step.loss for step in other.steps]
    for component, layers in other.weights.items():
        for layer, pair in layers.items():
            assert torch.equal(one.weights[component][layer]["lora_A"], pair["lora_A"])
            assert torch.equal(one.weights[component][layer]["lora_B"], pair["lora_B"])


def test_a_run_on_it_equals_the_run_from_its_folder_and_leaves_it_as_it_was(pipe: Any, model: str) -> None:
    before = snapshot(pipe)
    result = lora_forge.run(PROMPT, model, pipeline=pipe, iterations=3)
    assert_untouched(pipe, before)
    reference = lora_forge.run(PROMPT, model, iterations=3)
    assert_equal_runs(result, reference)
    assert result.effect == reference.effect


def test_a_run_through_its_unet_equals_the_run_from_its_folder_and_leaves_it_as_it_was(
    pipe: Any, model: str, plugin: Path
) -> None:
    before = snapshot(pipe)
    settings: dict[str, Any] = {"plugins": [plugin], "loss": "noise", "iterations": 2}
    result = lora_forge.run(PROMPT, model, pipeline=pipe, **settings)
    assert_untouched(pipe, before)
    assert result.weights["unet"]["mid_block.attentions.0.transformer_blocks.0.attn1.to_v"]["lora_B"].any()
    assert_equal_runs(result, lora_forge.run(PROMPT, model, **settings))


def test_a_run_that_fails_leaves_it_as_it_was(pipe: Any, model: str, plugin: Path) -> None:
    before = snapshot(pipe)
    with pytest.raises(RunFailed, match="no more"):
        lora_forge.run(PROMPT, model, pipeline=pipe, plugins=[plugin], loss="broken", iterations=2)
    assert_untouched(pipe, before)


def test_a_session_on_it_runs_many_prompts_and_gives_it_back_when_closed(pipe: Any, model: str) -> None:
    before = snapshot(pipe)
    with lora_forge.load(model, pipeline=pipe) as session:
        results = [session.run(prompt, iterations=2) for prompt in (PROMPT, "another", PROMPT)]
    assert_untouched(pipe, before)
    assert_equal_runs(results[2], results[0])
    assert_equal_runs(results[1], lora_forge.run("another", model, iterations=2))


@pytest.mark.parametrize("saver", ["safetensors", "diffusers"])
def test_it_can_load_the_lora_once_it_is_released(pipe: Any, model: str, tmp_path: Path, saver: str) -> None:
    output = tmp_path / "owl.safetensors"
    result = lora_forge.run(PROMPT, model, pipeline=pipe, iterations=3, saver=saver, output=output)
    loaded = load_whole(pipe, output)
    assert loaded.keys() == {(component, layer) for component, layers in result.weights.items() for layer in layers}
    assert "load_lora_weights" in result.usage


@pytest.mark.parametrize("adapted", ["unet", "last encoder", "all"])
def test_a_pipeline_that_carries_a_lora_already_is_an_error_of_one_line(
    pipe: Any, model: str, family: Family, adapted: str
) -> None:
    from peft import LoraConfig

    components = {"unet": ["unet"], "last encoder": list(family.encoders)[-1:], "all": family.components}[adapted]
    for component in components:
        targets = ["to_q"] if component == "unet" else ["q_proj"]
        getattr(pipe, component).add_adapter(LoraConfig(r=2, target_modules=targets), adapter_name="earlier")
    before = snapshot(pipe)[1]
    with pytest.raises(ModelError, match=f"{components[0]} already carries a LoRA") as caught:
        lora_forge.run(PROMPT, model, pipeline=pipe, iterations=1)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in numbers(pipe).items())


def test_what_is_no_whole_pipeline_of_the_family_is_an_error_that_says_what_it_lacks(
    pipe: Any, model: str, family: Family
) -> None:
    with pytest.raises(ModelError, match=f"object is no {re.escape(family.title)} pipeline"):
        lora_forge.run(PROMPT, model, pipeline=object(), iterations=1)
    pipe.text_encoder = None
    with pytest.raises(ModelError, match=r"it has no text_encoder$"):
        lora_forge.run(PROMPT, model, pipeline=pipe, iterations=1)


def test_what_belongs_to_a_model_that_is_read_is_refused_and_the_record_says_in_memory(pipe: Any, model: str) -> None:
    for idle in ({"base_model": "elsewhere"}, {"device": "cuda"}, {"dtype": "float16"}):
        with pytest.raises(UsageError, match="belongs to a model that is read"):
            lora_forge.run(PROMPT, model, pipeline=pipe, **idle)
    result = lora_forge.run(PROMPT, model, pipeline=pipe, iterations=0)
    assert json.loads(result.metadata["lora_forge"])["run"]["base_model"] == "in memory"
