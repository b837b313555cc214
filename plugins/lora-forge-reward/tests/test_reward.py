"""Rewards in runs: what they come to, whose they are, and what is said when one cannot be had."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_forge_reward import lora_forge_losses
from lora_forge_reward.clip import ClipSimilarity, prepare
from lora_forge_reward.functions import find_function
from lora_forge_reward.options import Options
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

import lora_forge
from lora_forge import RunResult
from lora_forge.builtin.sd15.family import SD15
from lora_forge.cli.main import main
from lora_forge.clip_unet.tiny import tiny_folder
from lora_forge.clock import Clock
from lora_forge.config.run import read_run_config
from lora_forge.errors import LoraForgeError, ModelError, ObjectiveError, PluginError
from lora_forge.model import open_model
from lora_forge.options import describe_options
from lora_forge.plan import Request, make_plan
from lora_forge.plugins import discover
from lora_forge.runner import forge
from lora_forge.testing import check_loss

REWARDS = Path(__file__).parent / "rewards.py"
PROMPTS = ("a steampunk owl", "bond", "a squirrel in a forest")


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP with random weights, as transformers saves it."""
    folder = tmp_path_factory.mktemp("clip")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = CLIPTokenizer.from_pretrained(tiny_folder(SD15) / "tokenizer")
    text = {
        **small,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 77,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = CLIPConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=12)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def loss(function: str | None = "brightness", **options: Any) -> dict[str, Any]:
    chosen = {"function": f"{REWARDS}:{function}"} if function else {}
    return {"name": "reward", "options": {"steps": 2, "guidance": 1.0, **chosen, **options}}


def run(model: str = "tiny_sdxl", iterations: int = 2, **options: Any) -> RunResult:
    optimizer = {"name": "adamw", "options": {"lr": 0.01}}
    return lora_forge.run(PROMPTS[0], model, loss=loss(**options), optimizer=optimizer, iterations=iterations)


@pytest.mark.parametrize("model", ["tiny_sdxl", "tiny_sd15"])
def test_a_reward_for_brightness_makes_pictures_brighter(model: str) -> None:
    result = run(model, iterations=10, gradient_steps=2)
    assert result.after.terms["reward"] < result.before.terms["reward"] - 0.02
    assert any(pair["lora_B"].any() for pair in result.weights["unet"].values())
    assert any(pair["lora_B"].any() for pair in result.weights["text_encoder"].values())


def test_clip_similarity_rises(clip_folder: Path) -> None:
    result = run(function=None, clip_folder=str(clip_folder), iterations=15)
    assert result.after.terms["reward"] < result.before.terms["reward"] - 0.01


def test_clip_similarity_is_that_of_transformers_own_processor_and_model(clip_folder: Path) -> None:
    model, tokenizer = CLIPModel.from_pretrained(clip_folder), CLIPTokenizer.from_pretrained(clip_folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    bytes_ = torch.randint(0, 256, (3, 3, 48, 80), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    pixels = processor(list(bytes_), return_tensors="pt")["pixel_values"]
    # The processor rounds to whole bytes, 0.015 each, once for the height and once for the width.
    apart = (prepare(bytes_ / 255, 32) - pixels).abs()
    assert float(apart.mean()) < 0.01
    assert float(apart.max()) < 0.15
    texts = tokenizer(list(PROMPTS), padding=True, return_tensors="pt")
    with torch.no_grad():
        scores = model(pixel_values=pixels, **texts).logits_per_image.diagonal() / model.logit_scale.exp()
        own = ClipSimilarity(clip_folder)(bytes_ / 255, PROMPTS)
    assert torch.allclose(own, scores, atol=2e-3)


def test_the_gradient_of_clip_similarity_is_that_of_finite_differences(clip_folder: Path) -> None:
    pictures = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(2)) * 0.8 + 0.1
    similarity = ClipSimilarity(clip_folder)
    leaf = pictures.clone().requires_grad_()
    similarity(leaf, PROMPTS[:1]).sum().backward()
    assert leaf.grad is not None
    step = 0.02 * leaf.grad / leaf.grad.abs().max()
    with torch.no_grad():
        change = similarity(pictures + step, PROMPTS[:1]) - similarity(pictures - step, PROMPTS[:1])
    assert float(change) == pytest.approx(2 * float((step * leaf.grad).sum()), rel=0.05)


def test_a_reward_model_is_a_class_that_is_made_once() -> None:
    first, second = run(function="Colour"), run(function="Colour")
    assert first.before == second.before
    made = find_function(Path(f"{REWARDS}:Colour"))
    assert type(made).made == 1  # type: ignore[attr-defined]


def test_a_function_of_an_installed_module_is_found_by_its_dotted_name() -> None:
    found = find_function(Path("lora_forge_reward.functions:find_function"))
    assert found is find_function


def test_prompts_together_come_out_as_each_does_alone() -> None:
    registry = discover()
    config = {"prompt": PROMPTS[0], "model": "tiny_sdxl", "loss": loss("by_length", guidance=3.0), "iterations": 2}
    plan = make_plan(read_run_config([config]), registry)
    requests = [Request(prompt, None, seed, None) for seed, prompt in enumerate(PROMPTS)]
    for seed, result in enumerate(forge(plan, requests, open_model(plan), registry, Clock())):
        alone = lora_forge.run(PROMPTS[seed], "tiny_sdxl", seed=seed, loss=config["loss"], iterations=2)
        assert result.before.terms["reward"] == pytest.approx(alone.before.terms["reward"], rel=1e-4)
        assert result.after.terms["reward"] == pytest.approx(alone.after.terms["reward"], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"function": "mean_of_all"}, ObjectiveError, "must give one number per picture, (1,); got shape ()"),
        ({"function": "counted"}, ObjectiveError, "has no gradient to the pictures, so nothing would be trained"),
        ({"function": "darkness"}, PluginError, "rewards.py has no function 'darkness'"),
        ({"function": "Unmakeable"}, PluginError, "cannot be made: TypeError"),
        (
            {"function": None, "clip_folder": "no_such_folder"},
            ModelError,
            "CLIP model 'no_such_folder' cannot be loaded",
        ),
    ],
    ids=lambda value: str(value),
)
def test_a_reward_that_is_none_is_said_in_one_line(
    options: dict[str, Any], error: type[LoraForgeError], words: str
) -> None:
    with pytest.raises(error) as caught:
        run(**options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reference", ["brightness", "rewards.py:", "no_such_module:f", "no_such_file.py:f"])
def test_a_reference_that_leads_nowhere_is_named(reference: str) -> None:
    with pytest.raises(PluginError, match=reference.split(":")[0]):
        find_function(Path(reference))


def test_a_file_keeps_no_path_and_repeating_its_run_never_runs_what_it_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "owl.safetensors"
    result = lora_forge.run(PROMPTS[0], "tiny_sdxl", loss=loss(), iterations=1, output=path)
    options = json.loads(result.metadata["lora_forge"])["run"]["loss"][0]["options"]
    assert options["function"] == "rewards.py:brightness"
    assert main(["run", "--like", str(path), "--output", str(tmp_path / "again.safetensors")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "reward.function: 'rewards.py:brightness' is a path" in said
    assert "give it again" in said


@pytest.mark.parametrize(
    "options",
    [
        Options(function=REWARDS.with_name("rewards.py:brightness"), steps=2),
        Options(function=REWARDS.with_name("rewards.py:Colour"), steps=1, guidance=1.0),
    ],
    ids=["guided", "one step"],
)
def test_it_keeps_the_contract_of_a_loss(options: Options) -> None:
    (spec,) = lora_forge_losses()
    check_loss(spec, options)


def test_it_keeps_it_installed_under_its_name_with_clip(check_plugin: Callable[..., Any], clip_folder: Path) -> None:
    check_plugin("reward", kind="loss", clip_folder=str(clip_folder), steps=1)


def test_each_option_says_what_it_is() -> None:
    assert all(option.help for option in describe_options(Options))


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    script = (
        "import sys; from lora_forge.cli.main import main; main(['plugins', 'show', 'reward']); "
        "print('imported:', [name for name in ['torch', 'transformers', 'diffusers'] if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("imported: []\n")
