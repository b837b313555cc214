"""Images of a preview: against diffusers' own calls, with ΔW added to the weights by hand."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers_reader import open_pipeline
from layer_files import Layers, random_layers
from preview_by_hand import added, percent, picture

from lora_forge.clip_unet.family import Family
from lora_forge.effect.of_file import Prompt
from lora_forge.errors import LoraFileError, ModelError
from lora_forge.preview.adapter import check_bare
from lora_forge.preview.render import Preview, render_preview

OWL, CHERRIES = Prompt("training", "a steampunk owl"), Prompt("control", "a bowl of cherries")
STRONG = 0.02  # of B, for a ΔW that changes a picture and leaves it one
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def pipe(family: Family, model_folder: Path) -> Any:
    """Used before, with flags set as its owner may have left them."""
    pipe = open_pipeline(family.name, model_folder)
    pipe.text_encoder.requires_grad_(False)
    pipe.unet.mid_block.train()
    picture(pipe, "anything", 0, num_inference_steps=1)
    return pipe


@pytest.fixture(scope="module")
def layers(model: str) -> Layers:
    """Of one block of each component: PEFT takes its time over each layer."""
    some = random_layers(model, chosen=lambda layer: "mid_block" in layer or ".layers.0." in layer)
    return {key: one._replace(up=one.up * STRONG) for key, one in some.items()}


@pytest.fixture(scope="module")
def tensors(layers: Layers) -> Tensors:
    return spelled(layers)


def spelled(layers: Layers) -> Tensors:
    """diffusers' spelling, which takes alpha for the rank; so it is."""
    downs = {f"{component}.{layer}.lora_A.weight": one.down for (component, layer), one in layers.items()}
    ups = {f"{component}.{layer}.lora_B.weight": one.up for (component, layer), one in layers.items()}
    return downs | ups


@pytest.fixture(scope="module")
def preview(pipe: Any, tensors: Tensors) -> Preview:
    return render_preview(pipe, tensors, [OWL, CHERRIES], strengths=(0.5, 0, 1), seeds=(3, 0), steps=2)


def pixels(preview: Preview, prompt: Prompt, seed: int, strength: float) -> np.ndarray[Any, Any]:
    (found,) = [one for one in preview.pictures if (one.prompt, one.seed, one.strength) == (prompt, seed, strength)]
    return np.asarray(found.image)


def state(pipe: Any) -> dict[str, Any]:
    """All there is to see of a pipeline, its scheduler and its modules."""
    seen: dict[str, Any] = {"own": {name: id(value) for name, value in vars(pipe).items()}}
    seen["scheduler"] = {name: str(value) for name, value in vars(pipe.scheduler).items()}
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            for path, module in part.named_modules():
                seen[f"{name} {path}"] = (id(module), type(module), module.training, sorted(vars(module)))
            for path, one in part.named_parameters():
                seen[f"{name} {path} parameter"] = (id(one), one.requires_grad, one._version)
    return seen


def test_strength_0_is_the_base_model_bit_for_bit_and_no_image_depends_on_the_others(
    pipe: Any, tensors: Tensors, preview: Preview
) -> None:
    for prompt in (OWL, CHERRIES):
        for seed in (0, 3):
            assert np.array_equal(pixels(preview, prompt, seed, 0), picture(pipe, prompt.text, seed))
    alone = render_preview(pipe, tensors, [CHERRIES], strengths=[1], seeds=[0], steps=2)
    assert [one.strength for one in alone.pictures] == [0, 1]
    for strength in (0, 1):
        assert np.array_equal(pixels(alone, CHERRIES, 0, strength), pixels(preview, CHERRIES, 0, strength))


def test_with_the_lora_images_are_those_of_weights_with_strength_times_the_change_added(
    pipe: Any, layers: Layers, preview: Preview
) -> None:
    deltas = {key: one.delta.float() for key, one in layers.items()}
    bases = {prompt: picture(pipe, prompt.text, 3) for prompt in (OWL, CHERRIES)}
    for strength in (0.5, 1):
        with added(pipe, deltas, strength):
            for prompt, base in bases.items():
                expected = picture(pipe, prompt.text, 3)
                made = pixels(preview, prompt, 3, strength)
                assert np.abs(made.astype(int) - expected.astype(int)).max() <= 2
                (shown,) = [
                    one.difference
                    for one in preview.pictures
                    if (one.prompt, one.seed, one.strength) == (prompt, 3, strength)
                ]
                assert shown == pytest.approx(percent(base, made), rel=1e-9)
                assert shown == pytest.approx(percent(base, expected), rel=0.01)
                assert shown > 0.1


def test_the_means_and_their_ratio_are_of_each_strengths_images(preview: Preview) -> None:
    assert preview.strengths == (0, 0.5, 1)
    assert [(one.prompt.role, one.seed, one.strength) for one in preview.pictures[:4]] == [
        ("training", 3, 0),
        ("training", 3, 0.5),
        ("training", 3, 1),
        ("training", 0, 0),
    ]
    for one in preview.differences():
        mean = {
            role: sum(p.difference for p in preview.pictures if p.prompt.role == role and p.strength == one.strength)
            / 2
            for role in ("training", "control")
        }
        assert (one.training, one.controls) == pytest.approx((mean["training"], mean["control"]))
        assert one.ratio == pytest.approx(mean["training"] / mean["control"])
    assert [one.strength for one in preview.differences()] == [0.5, 1]


def test_without_control_prompts_there_is_no_ratio(pipe: Any, tensors: Tensors) -> None:
    (one,) = render_preview(pipe, tensors, [OWL], strengths=[1], steps=1, size=(32, 16)).differences()
    assert (one.controls, one.ratio) == (None, None)


def test_size_guidance_and_the_second_prompt_are_the_pipelines_own_arguments(
    pipe: Any, family: Family, tensors: Tensors
) -> None:
    prompt = Prompt("training", "an owl", "brass")
    made = render_preview(pipe, tensors, [prompt], strengths=[], steps=2, guidance=2.0, size=(40, 32))
    assert (made.size, made.guidance, made.steps) == ((40, 32), 2.0, 2)
    second = {"prompt_2": "brass"} if family.name == "sdxl" else {}
    expected = picture(pipe, "an owl", 0, guidance_scale=2.0, width=40, height=32, **second)
    assert np.array_equal(pixels(made, prompt, 0, 0), expected)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_pipeline_is_left_as_it_was_found(pipe: Any, tensors: Tensors, error: type[BaseException] | None) -> None:
    before, numbers = state(pipe), picture(pipe, OWL.text, 0, num_inference_steps=1)
    before = state(pipe)
    images = 0

    def each(total: int) -> None:
        nonlocal images
        images += 1
        if error and images == total:  # when the LoRA is in
            raise error

    def render() -> None:
        render_preview(pipe, tensors, [OWL], strengths=[0.5, 1], steps=1, each=each)

    if error:
        with pytest.raises(error):
            render()
    else:
        render()
    assert images == 3
    assert state(pipe) == before
    assert np.array_equal(picture(pipe, OWL.text, 0, num_inference_steps=1), numbers)
    check_bare(pipe)


def test_a_pipeline_that_carries_a_lora_already_is_refused_and_keeps_it(pipe: Any, tensors: Tensors) -> None:
    pipe.load_lora_weights(dict(tensors), adapter_name="mine")
    try:
        with pytest.raises(ModelError, match=r"already carries a LoRA; unload it first \(pipe.unload_lora_weights"):
            render_preview(pipe, tensors, [OWL], steps=1)
        assert pipe.get_active_adapters() == ["mine"]
    finally:
        pipe.unload_lora_weights()


def test_what_does_not_fit_is_refused_by_name_and_the_pipeline_left_as_it_was(
    pipe: Any, family: Family, tensors: Tensors
) -> None:
    q_proj = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    pair = {"lora_A.weight": torch.ones(2, 32), "lora_B.weight": torch.ones(32, 2)}
    title = family.pipeline
    cases: list[tuple[Tensors, str]] = [
        (
            {f"text_encoder_3.q.{name}": one for name, one in pair.items()},
            f"{title} has not these layers of the LoRA: ",
        ),
        ({f"unet.no.such.{name}": one for name, one in pair.items()}, "'unet.no.such'"),
        ({f"{q_proj}.{name}": one[..., :7] for name, one in pair.items()}, f"of another size: '{q_proj}'"),
    ]
    before = state(pipe)
    for wrong, words in cases:
        with pytest.raises(LoraFileError) as caught:
            render_preview(pipe, {**tensors, **wrong}, [OWL], strengths=[1], steps=1)
        assert words in str(caught.value)
        assert state(pipe) == before


def test_a_layer_that_diffusers_leaves_out_is_an_error_that_names_it(
    pipe: Any, tensors: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    loads = type(pipe).load_lora_weights

    def some(self: Any, given: Tensors, **settings: Any) -> None:
        loads(self, {name: one for name, one in given.items() if left not in name}, **settings)

    monkeypatch.setattr(type(pipe), "load_lora_weights", some)
    with pytest.raises(LoraFileError, match=f"loads only part of this LoRA, and leaves out '{left}'"):
        render_preview(pipe, tensors, [OWL], strengths=[1], steps=1)
    check_bare(pipe)


def test_what_diffusers_refuses_is_told_in_its_own_words(
    pipe: Any, tensors: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(self: Any, given: Tensors, **settings: Any) -> None:
        raise ValueError("not\na LoRA")

    monkeypatch.setattr(type(pipe), "load_lora_weights", refuses)
    with pytest.raises(LoraFileError, match="diffusers does not load this LoRA: not a LoRA"):
        render_preview(pipe, tensors, [OWL], strengths=[1], steps=1)


def test_images_that_are_not_finite_are_no_images(pipe: Any, tensors: Tensors) -> None:
    loud = {name: one * 1e30 if "lora_B" in name else one for name, one in tensors.items()}
    with pytest.raises(LoraFileError, match=r"with this LoRA at strength 1, the image for 'a steampunk owl' is not"):
        render_preview(pipe, loud, [OWL], strengths=[1], steps=1)
    broken = copy.copy(pipe)
    broken.vae = copy.deepcopy(pipe.vae)
    broken.vae.decoder.conv_out.bias.data.fill_(torch.nan)
    with pytest.raises(ModelError, match="without a LoRA, the image for 'a steampunk owl' is not finite"):
        render_preview(broken, tensors, [OWL], strengths=[1], steps=1)


def test_too_little_memory_is_told_with_what_to_do(
    pipe: Any, tensors: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **settings: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pipe.unet, "forward", full)
    with pytest.raises(ModelError, match="needs more memory than cpu has; a smaller --size"):
        render_preview(pipe, tensors, [OWL], steps=1)


@pytest.mark.parametrize(
    "path", ["unet.conv_in", "text_encoder.text_model.encoder.layers.0.mlp.fc1", "text_encoder_2.text_projection"]
)
def test_one_layer_alone_is_shown_as_its_change_of_the_weights(pipe: Any, family: Family, path: str) -> None:
    component, _, layer = path.partition(".")
    if component not in family.components:
        pytest.skip(f"{family.title} has no {component}")
    weight = dict(weights(getattr(pipe, component)))[layer]
    torch.manual_seed(0)
    down, up = torch.randn(2, *weight.shape[1:]) / 2, torch.randn(len(weight), 2, *[1] * (weight.ndim - 2)) / 8
    made = render_preview(
        pipe, {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}, [OWL], strengths=[1], steps=2
    )
    with added(pipe, {(component, layer): up.flatten(1) @ down.flatten(1)}):
        expected = picture(pipe, OWL.text, 0)
    assert np.abs(pixels(made, OWL, 0, 1).astype(int) - expected.astype(int)).max() <= 2
    assert made.pictures[1].difference > 0.01


def weights(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every layer's, by its path with the level that recent versions of transformers have dropped."""
    for path, child in module.named_modules():
        if isinstance(child, torch.nn.Linear | torch.nn.Conv2d):
            yield path, child.weight.detach()
            yield f"text_model.{path}", child.weight.detach()
