"""`lora-forge preview`: what it prints and writes, and what it refuses before anything is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_reader import open_pipeline
from PIL import Image
from preview_by_hand import percent, picture
from refusals import refused
from safetensors.torch import load_file, save_file

import lora_forge
from lora_forge.cli.main import main
from lora_forge.clip_unet.family import Family
from lora_forge.effect.control_prompts import CONTROL_PROMPTS

OWL = "a steampunk owl"
SMALL = "tiny_sd15"
FEW = ("--steps", "1", "--size", "16", "--no-controls")
Preview = Callable[..., dict[str, Any]]


@pytest.fixture
def preview(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Preview:
    """What `preview --json` prints, of a picture at `tmp_path/grid.png` unless told otherwise."""

    def call(*arguments: str | Path) -> dict[str, Any]:
        capsys.readouterr()
        output = () if "-o" in arguments else ("-o", str(tmp_path / "grid.png"), "--overwrite")
        code = main(["preview", *map(str, arguments), "--device", "cpu", "--json", *output])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        answer: dict[str, Any] = json.loads(captured.out)
        return answer

    return call


@pytest.fixture(scope="module")
def owl(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made on the family's tiny model for a prompt that its record names."""
    path = tmp_path_factory.mktemp("owl") / "owl.safetensors"
    lora_forge.run(OWL, model, iterations=2, target_shift=0.2, output=path)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block of a LoRA of the smaller tiny model, with its record: for what is no family's own, in less time."""
    whole, path = (tmp_path_factory.mktemp(name) / "owl.safetensors" for name in ("whole", "small"))
    made = lora_forge.run(OWL, SMALL, iterations=2, target_shift=0.2, output=whole)
    block = {name: one for name, one in load_file(whole).items() if name.startswith("lora_te_") and "layers_0" in name}
    save_file(block, path, dict(made.metadata))
    return path


def test_the_numbers_are_those_of_the_pictures_that_diffusers_makes_with_the_file(
    owl: Path, family: Family, model: str, model_folder: Path, preview: Preview, tmp_path: Path
) -> None:
    answer = preview(owl, "--control", "a bowl of cherries", "--strengths", "1", "--seeds", "5", "--steps", "2")
    assert (answer["base_model"], answer["backend"], answer["output"]) == (
        model,
        family.name,
        str(tmp_path / "grid.png"),
    )
    assert (answer["strengths"], answer["seeds"], answer["steps"], answer["size"]) == ([0, 1], [5], 2, [64, 64])
    pipe = open_pipeline(family.name, model_folder)
    texts = [OWL, "a bowl of cherries"]
    bases = [picture(pipe, text, 5) for text in texts]
    pipe.load_lora_weights(str(owl))
    differences = [percent(base, picture(pipe, text, 5)) for base, text in zip(bases, texts, strict=True)]
    shown = [(one["role"], one["text"], one["strength"]) for one in answer["images"]]
    assert shown == [
        (role, text, at) for role, text in zip(("training", "control"), texts, strict=True) for at in (0, 1)
    ]
    assert [one["difference"] for one in answer["images"]][::2] == [0, 0]
    assert [one["difference"] for one in answer["images"]][1::2] == pytest.approx(differences, rel=0.01)
    (mean,) = answer["differences"]
    assert mean["ratio"] == pytest.approx(differences[0] / differences[1], rel=0.02)


def test_the_picture_goes_beside_the_file_as_a_png_and_replaces_nothing_unasked(
    small: Path, preview: Preview, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    copy = tmp_path / "my owl.safetensors"
    copy.write_bytes(small.read_bytes())
    assert main(["preview", str(copy), *FEW, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    made = tmp_path / "my owl.grid.png"
    assert f"picture: {made}" in printed
    with Image.open(made) as image:
        assert image.format == "PNG"
        assert image.size > (3 * 192, 192)
    words = refused(capsys, "preview", copy, *FEW)
    assert "my owl.grid.png' exists; --overwrite replaces it" in words
    made.write_bytes(b"old")
    preview(copy, *FEW, "--overwrite", "-o", made)
    assert made.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my owl.grid.png", "my owl.safetensors"]


def test_the_table_names_every_prompt_and_seed_and_the_means(
    small: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["--control", "[bold]red[/]", "--seeds", "0,3", "--steps", "1", "--size", "16", "--device", "cpu"]
    assert main(["preview", str(small), *arguments, "-o", str(tmp_path / "grid.png")]) == 0
    printed = capsys.readouterr().out
    for words in (OWL, "[bold]red[/]", "at 0.5", "at 1", "training / control"):
        assert words in printed
    rows = [[cell.strip() for cell in line.split("│")[1:4]] for line in printed.splitlines() if "│" in line]
    assert [row for row in rows if row[2]] == [
        [role, text, seed] for role, text in (("training", OWL), ("control", "[bold]red[/]")) for seed in ("0", "3")
    ]


def test_two_control_prompts_are_drawn_by_the_seed_unless_some_are_given_or_none_is_wanted(
    small: Path, preview: Preview
) -> None:
    def controls(*arguments: str) -> list[str]:
        few = ("--steps", "1", "--size", "8", "--strengths", "1")
        images = preview(small, *few, *arguments)["images"]
        return list(dict.fromkeys(one["text"] for one in images if one["role"] == "control"))

    drawn = controls()
    assert len(drawn) == 2
    assert set(drawn) <= set(CONTROL_PROMPTS)
    assert drawn != controls("--seed", "1")
    assert controls("--control", "one", "--control", "two", "--control", "one") == ["one", "two"]
    assert controls("--no-controls") == []


def test_anybodys_spelling_of_the_same_lora_makes_the_same_picture(
    small: Path, preview: Preview, tmp_path: Path
) -> None:
    first = preview(small, *FEW)
    grid = (tmp_path / "grid.png").read_bytes()
    for format, name in [("diffusers", "diffusers.safetensors"), ("peft", "peft")]:
        assert main(["convert", str(small), str(tmp_path / name), "--to", format]) == 0
        again = preview(tmp_path / name, "--model", first["base_model"], "--prompt", OWL, *FEW)
        assert [one["difference"] for one in again["images"]] == pytest.approx(
            [one["difference"] for one in first["images"]], abs=1e-9
        )
        assert (tmp_path / "grid.png").read_bytes() == grid


def test_a_lora_of_ranks_and_alphas_of_all_sorts_and_half_an_attention_is_put_in_whole(
    family: Family, model: str, model_folder: Path, preview: Preview, tmp_path: Path
) -> None:
    """diffusers' own reader takes alphas that differ for alike; the weights with ΔW added are the truth."""
    from layer_files import random_layers, save_universal
    from preview_by_hand import added

    some = random_layers(model, chosen=lambda layer: layer.endswith(("layers.0.self_attn.q_proj", "attn1.to_v")))
    ragged = {
        key: one._replace(down=one.down[: 1 + at % 3] / 8, alpha=(0.5, 3.0, 8.0)[at % 3])
        for at, (key, one) in enumerate(some.items())
    }
    ragged = {key: one._replace(up=one.up[:, : len(one.down)].contiguous()) for key, one in ragged.items()}
    file = save_universal(tmp_path / "ragged.safetensors", family.name, ragged)
    answer = preview(file, "--model", model, "--prompt", OWL, "--no-controls", "--strengths", "1", "--steps", "2")
    pipe = open_pipeline(family.name, model_folder)
    base = picture(pipe, OWL, 0)
    with added(pipe, {key: one.delta.float() for key, one in ragged.items()}):
        expected = percent(base, picture(pipe, OWL, 0))
    assert answer["images"][1]["difference"] == pytest.approx(expected, rel=0.01)
    assert expected > 0.5


def test_a_second_prompt_in_the_record_is_drawn_as_the_run_read_it(preview: Preview, tmp_path: Path) -> None:
    path = tmp_path / "two.safetensors"
    lora_forge.run(OWL, "tiny_sdxl", prompt_2="brass", iterations=1, target_shift=0.2, output=path)
    images = preview(path, *FEW)["images"]
    assert {(one["text"], one["text_2"]) for one in images} == {(OWL, "brass")}
    alone = preview(path, "--prompt", OWL, *FEW)["images"]
    assert {one["text_2"] for one in alone} == {None}
    assert images[1]["difference"] != alone[1]["difference"]


def test_what_the_model_does_not_read_of_a_prompt_and_a_lora_without_effect_are_told(
    small: Path, preview: Preview, tmp_path: Path
) -> None:
    still = tmp_path / "still.safetensors"
    save_file({name: one * (".lora_up." not in name) for name, one in load_file(small).items()}, still)
    notes = preview(still, "--model", SMALL, "--prompt", "owl " * 80, *FEW)["notes"]
    assert notes[0].startswith("the training prompt is longer than the model reads; this is cut off: 'owl ")
    assert notes[1:] == ["the LoRA changes no pixel of any image"]


def test_what_cannot_be_done_is_refused_in_words_and_nothing_is_written(
    small: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bare, wide, more = (tmp_path / f"{name}.safetensors" for name in ("bare", "wide", "more"))
    tensors = load_file(small)
    save_file(tensors, bare)
    layer = next(name for name in tensors if name.startswith("lora_te")).partition(".")[0]
    down = torch.ones(tensors[f"{layer}.lora_down.weight"].shape[0], 7)
    save_file({**tensors, f"{layer}.lora_down.weight": down}, wide)
    save_file({**tensors, "something.else": torch.ones(2)}, more)
    known = ("--model", SMALL, "--prompt", OWL)
    before = sorted(tmp_path.iterdir())
    cases: list[tuple[tuple[str | Path, ...], str]] = [
        ((tmp_path / "none.safetensors",), "none.safetensors"),
        ((bare, "--model", SMALL), "holds no record of the prompt it was made for; give it with --prompt"),
        ((small, "--prompt", " "), "the training prompt is blank"),
        ((small, "--prompt", "half \ud83e"), "the training prompt is not valid Unicode"),
        ((small, "--control", ""), "the control prompt is blank"),
        ((small, "--control", "x", "--no-controls"), "give one of them"),
        ((small, "--strengths", "0,x"), "'x' is no number; give strengths with commas between"),
        ((small, "--strengths", "nan"), "'nan' is out of range"),
        ((small, "--strengths", "0,1e999"), "'1e999' is out of range"),
        ((small, "--strengths", ",".join(map(str, range(9)))), "9 strengths are more than 8"),
        ((small, "--strengths", "0,-0"), "all of them are 0"),
        ((small, "--seeds", "0.5"), "'0.5' is no number; give seeds"),
        ((small, "--seeds", "-1"), "'-1' is out of range"),
        ((small, "--seeds", ",".join(map(str, range(17)))), "17 seeds are more than 16"),
        (
            (small, "--seeds", "1,2,3,4,5,6,7,8", *(word for n in range(15) for word in ("--control", str(n)))),
            "384 images",
        ),
        ((small, "--guidance", "nan"), "nan is no guidance scale"),
        ((small, "--steps", "0"), "steps"),
        ((small, "--size", "big"), "'big' is no size; give 512, or 768x512"),
        ((small, "--size", "12"), "12 is no multiple of 8"),
        ((small, "--size", "64x99999"), "multiple of 8 up to 4096"),
        ((small, "-o", tmp_path / "owl.jpg"), "let it end in .png"),
        ((small, "-o", tmp_path), "let it end in .png"),
        ((small, "--device", "toaster"), "unknown device 'toaster'"),
        ((small, "--dtype", "float8"), "float8"),
        ((small, "--backend-opt", "x=1"), "x"),
        ((wide, *known), "in the base model these layers are of another size: '"),
        ((more, *known), "1 key is no plain LoRA's: 'something.else'"),
    ]
    for arguments, words in cases:
        assert words in refused(capsys, "preview", *arguments), arguments
    assert sorted(tmp_path.iterdir()) == before
    assert [path.name for path in small.parent.iterdir()] == ["owl.safetensors"]


def test_a_picture_never_replaces_the_lora_it_is_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "owl.png"
    path.write_bytes(b"a LoRA by another name")
    assert "holds the input" in refused(capsys, "preview", path, "-o", path, "--overwrite")
    assert path.read_bytes() == b"a LoRA by another name"


def test_a_family_that_makes_no_images_is_told_as_such(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plugin = Path(__file__).parent / "data" / "text_only_backend.py"
    config, path = tmp_path / "reader_config.json", tmp_path / "read.safetensors"
    new = ["models", "new", "reader", "--base-model", "tiny_reader", "--plugin", str(plugin), "-o", str(config)]
    assert main([*new, "--rank", "2"]) == 0
    lora_forge.run(OWL, model=str(config), plugins=[plugin], iterations=1, output=path)
    words = refused(capsys, "preview", path, "--plugin", plugin, *FEW)
    assert "makes no images: it has no pipeline()" in words


def test_every_option_of_preview_is_on_its_page() -> None:
    from lora_forge.cli.preview import command

    text = (Path(__file__).parent.parent / "docs" / "preview.md").read_text(encoding="utf-8")
    options: Iterable[str] = (name for parameter in command.params for name in parameter.opts if name.startswith("--"))
    assert [name for name in options if f"`{name}`" not in text] == []
