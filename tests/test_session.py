"""Sessions: many prompts in turn on one loaded model."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

import lora_forge
from lora_forge.config.model import shipped_folder
from lora_forge.errors import UsageError

PARTI = Path(__file__).parent / "data" / "PartiPrompts.tsv"


def test_runs_of_a_session_equal_runs_alone_whatever_ran_before(model: str) -> None:
    with lora_forge.load(model) as session:
        session.run("something else", iterations=3, seed=9)
        second = session.run("a steampunk owl", iterations=3)
    alone = lora_forge.run("a steampunk owl", model, iterations=3)
    assert second.steps == alone.steps
    for component, layers in alone.weights.items():
        for layer, pair in layers.items():
            assert torch.equal(second.weights[component][layer]["lora_A"], pair["lora_A"])
            assert torch.equal(second.weights[component][layer]["lora_B"], pair["lora_B"])


def test_a_later_run_may_use_another_rank_and_alpha(model: str) -> None:
    with lora_forge.load(model) as session:
        session.run("a steampunk owl", iterations=1)
        result = session.run("a steampunk owl", iterations=3, rank=2, alpha=6)
    alone = lora_forge.run("a steampunk owl", model, iterations=3, rank=2, alpha=6)
    assert result.rank == 2
    assert result.steps == alone.steps


def test_what_the_model_depends_on_belongs_to_load() -> None:
    with lora_forge.load("tiny_sdxl") as session, pytest.raises(UsageError, match=r"base_model.*load\(\)"):
        session.run("a steampunk owl", base_model="elsewhere")


def test_a_failed_run_leaves_the_session_usable(model: str) -> None:
    with lora_forge.load(model) as session:
        with pytest.raises(UsageError, match="blank"):
            session.run("   ")
        with pytest.raises(UsageError, match="cannot reach"):
            session.run("a steampunk owl", inert="error")
        assert session.run("a steampunk owl", iterations=1).loss_before < 0


def test_settings_of_load_are_shared_and_those_of_run_win() -> None:
    with lora_forge.load("tiny_sdxl", iterations=4, seed=3) as session:
        assert (len(session.run("owl").steps), session.run("owl").run.seed) == (4, 3)
        assert len(session.run("owl", iterations=1).steps) == 1


def test_a_second_text_for_the_second_encoder_changes_its_layers_only() -> None:
    with lora_forge.load("tiny_sdxl", iterations=3) as session:
        one = session.run("a steampunk owl")
        other = session.run("a steampunk owl", prompt_2="a green pepper")
    first, second = "text_encoder", "text_encoder_2"
    same = [torch.equal(p["lora_B"], other.weights[first][n]["lora_B"]) for n, p in one.weights[first].items()]
    changed = [torch.equal(p["lora_B"], other.weights[second][n]["lora_B"]) for n, p in one.weights[second].items()]
    assert all(same)
    assert not any(changed)


def test_every_kind_of_prompt_people_write_goes_through(model: str) -> None:
    with PARTI.open(encoding="utf-8") as file:
        prompts = [row["Prompt"] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    odd = ["日本の城", "🦉🦉", "\\ \" ' `", "a" * 400, "<|endoftext|>", "(owl:1.3), [steampunk]", "line\nbreak"]
    with lora_forge.load(model, iterations=1) as session:
        for prompt in [*prompts[::40], *odd]:
            assert session.run(prompt).loss_after < 0


@pytest.mark.exhaustive
def test_all_parti_prompts_go_through_one_session() -> None:
    with PARTI.open(encoding="utf-8") as file:
        prompts = [row["Prompt"] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    assert len(prompts) == 1632
    with lora_forge.load("tiny_sdxl", iterations=2) as session:
        for prompt in prompts:
            assert session.run(prompt).loss_after < 0


def test_what_an_earlier_run_of_a_session_loaded_does_not_show_in_the_record(model: str, tmp_path: Path) -> None:
    plugin = tmp_path / "noise.py"
    plugin.write_text(
        "import torch\nfrom lora_forge import LossSpec, hookimpl\n"
        "def noise(batch):\n"
        "    latents = batch.randn('latents', *batch.latent_shape)\n"
        "    steps = torch.full((batch.prompts,), 500)\n"
        "    return batch.predict_noise(latents, steps, batch.adapted(), adapted=True).square().mean((1, 2, 3))\n"
        "@hookimpl\ndef lora_forge_losses():\n"
        "    yield LossSpec(name='noise', summary='', needs={'text', 'noise_prediction'}, factory=noise)\n"
    )
    with lora_forge.load(model, plugins=[plugin], iterations=2) as session:
        first = session.run("a steampunk owl")
        through_unet = session.run("a steampunk owl", loss="noise")
        again = session.run("a steampunk owl")
    assert again.metadata == first.metadata
    (unet,) = [effect for effect in through_unet.effect.components if effect.component == "unet"]
    assert unet.delta_norm > 0


def test_a_text_that_no_encoder_would_read_is_refused(tmp_path: Path) -> None:
    config = json.loads((shipped_folder() / "tiny_sdxl_config.json").read_text())
    config["target_layers_text_encoder_2"] = []
    (tmp_path / "first_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="prompt_2: no second text encoder is in use"):
        lora_forge.run("an owl", str(tmp_path / "first_config.json"), prompt_2="a fox")


def test_a_text_for_a_second_encoder_is_refused_where_the_family_has_one() -> None:
    with pytest.raises(UsageError, match="prompt_2: no second text encoder is in use"):
        lora_forge.run("an owl", "tiny_sd15", prompt_2="a fox")
