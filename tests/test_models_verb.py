"""`lora-forge models list`, `show` and `new`: configs derived from an architecture, without its weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from lora_forge.cli.main import main
from lora_forge.clip_unet.backend import ClipUnetBackend
from lora_forge.clip_unet.family import Family
from lora_forge.config.model import DIMENSIONS, TARGETS, read_model_config, shipped_folder

FULL_SIZE = {
    "sdxl": ("sdxl_base", "stabilityai/stable-diffusion-xl-base-1.0"),
    "sd15": ("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj", "to_q", "to_k", "to_v", "to_out.0")
MLP = ("mlp.fc1", "mlp.fc2", "ff.net.0.proj", "ff.net.2")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def without_weights(here: Path, model_folder: Path) -> str:
    """A folder of the tiny model's configs alone."""
    shutil.copytree(model_folder, here / "configs", ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*", "vae"))
    return "configs"


def new(*arguments: str) -> dict[str, Any]:
    """Derive the config `mine`, and read its JSON."""
    assert main(["models", "new", "mine", *arguments]) == 0
    data: dict[str, Any] = json.loads(Path("mine_config.json").read_text(encoding="utf-8"))
    return data


def targets_of(data: dict[str, Any]) -> dict[str, list[str]]:
    return {key.removeprefix(TARGETS): names for key, names in data.items() if key.startswith(TARGETS)}


def real_layers(family: Family, folder: Path) -> dict[str, dict[str, list[int]]]:
    """Every linear layer with its dimensions, as the weight files have it."""
    from safetensors import safe_open

    result: dict[str, dict[str, list[int]]] = {}
    for component in family.components:
        file = "model" if component in family.encoders else "diffusion_pytorch_model"
        with safe_open(folder / component / f"{file}.safetensors", framework="pt") as weights:
            shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
        result[component] = {
            name.removesuffix(".weight"): shape
            for name, shape in shapes.items()
            if name.endswith(".weight") and len(shape) == 2 and "embeddings" not in name
        }
    return result


def test_list_shows_every_shipped_config_with_its_layers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "list"]) == 0
    table = capsys.readouterr().out
    assert main(["models", "list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == {"sdxl_base", "tiny_sdxl", "sd15", "tiny_sd15"}
    assert rows["sdxl_base"]["target_layers"] == {"text_encoder": 48, "text_encoder_2": 128, "unet": 560}
    assert rows["sd15"]["target_layers"] == {"text_encoder": 48, "unet": 128}
    for family, (name, base_model) in FULL_SIZE.items():
        assert (rows[name]["backend"], rows[name]["base_model"]) == (family, base_model)
    assert all(name in table for name in rows)


@pytest.mark.parametrize("spelling", ["name", "path"])
def test_show_prints_the_numbers_and_every_target_layer(
    capsys: pytest.CaptureFixture[str], model: str, spelling: str
) -> None:
    name = model if spelling == "name" else str(shipped_folder() / f"{model}_config.json")
    config = read_model_config(model)
    assert main(["models", "show", name]) == 0
    lines = capsys.readouterr().out.splitlines()
    for component, layers in config.targets.items():
        for layer in layers:
            assert f"  {layer}  {list(config.dimensions[component][layer])}" in lines
    assert main(["models", "show", name, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["target_layers"] == {component: list(layers) for component, layers in config.targets.items()}
    assert (record["rank"], record["alpha"], record["learning_rate"]) == (4, 4, 1e-4)
    assert record["sha256"] == config.digest


CHOICES: list[tuple[tuple[str, ...], Callable[[str, str], bool]]] = [
    (("attention",), lambda component, layer: layer.endswith(ATTENTION)),
    (("attention+mlp",), lambda component, layer: layer.endswith(ATTENTION + MLP)),
    (("*attn2.to_k",), lambda component, layer: layer.endswith("attn2.to_k")),
    (("text_encoder.*q_proj",), lambda component, layer: component == "text_encoder" and layer.endswith("q_proj")),
    (("*.fc?", "*q_proj"), lambda component, layer: layer.endswith((".fc1", ".fc2", "q_proj"))),
    (("attention", "*.fc1"), lambda component, layer: layer.endswith((*ATTENTION, "fc1"))),
]


@pytest.mark.parametrize(("targets", "wanted"), CHOICES)
def test_new_derives_the_layers_asked_for_with_their_dimensions_and_no_weights(
    family: Family,
    model_folder: Path,
    without_weights: str,
    targets: tuple[str, ...],
    wanted: Callable[[str, str], bool],
) -> None:
    data = new("--base-model", without_weights, *(part for target in targets for part in ("--targets", target)))
    for component, layers in real_layers(family, model_folder).items():
        expected = {layer: size for layer, size in layers.items() if wanted(component, layer)}
        assert sorted(data[f"{TARGETS}{component}"]) == sorted(expected)
        assert data[f"{DIMENSIONS}{component}"] == expected
    assert (data["lora_rank"], data["lora_alpha"], data["base_model"]) == (8, 8, without_weights)
    assert data["backend"] == family.name


def test_all_is_every_linear_layer_inside_a_block(
    model: str, family: Family, model_folder: Path, without_weights: str
) -> None:
    data = new("--base-model", without_weights, "--targets", "all")
    blocks = ("text_model.encoder.layers.*", "down_blocks.*", "mid_block.*", "up_blocks.*")
    for component, layers in real_layers(family, model_folder).items():
        inside = {layer for layer in layers if any(fnmatchcase(layer, block) for block in blocks)}
        assert set(data[f"{TARGETS}{component}"]) == inside
    every = targets_of(data)
    assert "down_blocks.0.resnets.0.time_emb_proj" in every["unet"]
    fewer = targets_of(new("--base-model", model, "--targets", "attention+mlp", "--overwrite"))
    assert set(fewer["unet"]) < set(every["unet"])


@pytest.mark.parametrize("targets", ["attention", "attention+mlp", "all", "*v_proj"])
def test_a_derived_config_runs(capsys: pytest.CaptureFixture[str], model: str, targets: str) -> None:
    data = new("--base-model", model, "--targets", targets, "--rank", "2", "--alpha", "3.5")
    assert (data["lora_rank"], data["lora_alpha"]) == (2, 3.5)
    capsys.readouterr()
    command = ["run", "--prompt", "an owl", "--model", "mine_config.json", "--iterations", "1"]
    assert main([*command, "-o", "owl.safetensors", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["model"] == "mine"
    layers = {row["component"]: row["layers"] for row in result["effect"]["components"]}
    assert layers == {component: len(names) for component, names in targets_of(data).items() if names}


def test_a_config_derived_from_configs_alone_runs_on_a_model_with_weights(
    capsys: pytest.CaptureFixture[str], without_weights: str, model_folder: Path
) -> None:
    new("--base-model", without_weights, "--rank", "2")
    capsys.readouterr()
    command = ["run", "--prompt", "an owl", "--model", "mine_config.json", "--iterations", "1", "-o", "owl"]
    assert main(command) == 2
    assert "has no text_encoder/model.safetensors" in capsys.readouterr().err
    assert main([*command, "--base-model", str(model_folder)]) == 0


@pytest.mark.parametrize("targets", [[], ["--targets", "attention"]])
def test_the_shipped_config_is_what_new_derives_from_the_real_architecture(family: Family, targets: list[str]) -> None:
    name, base_model = FULL_SIZE[family.name]
    derived = new("--base-model", str(family.configs), *targets)
    shipped = json.loads((shipped_folder() / f"{name}_config.json").read_text(encoding="utf-8"))
    assert derived.pop("base_model") == str(family.configs)
    assert shipped.pop("base_model") == base_model
    assert derived == shipped
    assert list(derived) == list(shipped)


def test_new_reads_no_weights(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    def no_weights(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(ClipUnetBackend, "load", no_weights)
    shipped = read_model_config(model).targets
    assert {c: set(layers) for c, layers in targets_of(new("--base-model", model)).items()} == {
        c: set(layers) for c, layers in shipped.items()
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--targets", "*attn3*"], "targets: '*attn3*' matches no layer"),
        (["--targets", "atention"], "did you mean 'attention'?"),
        (["--targets", "attention", "--targets", "nothing"], "targets: 'nothing' matches no layer"),
        (["--rank", "0"], "--rank"),
        (["--rank", "33"], "lora_rank: 33 is larger than text_encoder."),
        (["--alpha", "0"], "lora_alpha: expected a number > 0"),
        (["--alpha", "nan"], "lora_alpha: expected a number > 0"),
        (["--backend", "sdxll"], "unknown backend 'sdxll'; did you mean 'sdxl'?"),
        (["--base-model", "missing"], "base model 'missing' does not exist"),
        (["--base-model", "empty"], "base model 'empty' has no unet/config.json"),
        (["-o", "empty"], "output 'empty' is a directory"),
        (["-o", "mine.txt/x.json"], "is not a directory"),
        (["-o", "mine.txt"], "output 'mine.txt' exists; --overwrite replaces it"),
    ],
)
def test_what_new_cannot_do_is_one_line_and_leaves_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    (here / "empty").mkdir()
    (here / "mine.txt").write_text("dear to someone", encoding="utf-8")
    assert main(["models", "new", "mine", "--base-model", "tiny_sdxl", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert words in printed.err
    assert printed.err.count("\n") == 1
    assert sorted(path.name for path in here.rglob("*")) == ["empty", "mine.txt"]
    assert (here / "mine.txt").read_text(encoding="utf-8") == "dear to someone"


def test_new_replaces_a_file_only_when_told_to(capsys: pytest.CaptureFixture[str]) -> None:
    new("--base-model", "tiny_sdxl", "--targets", "attention")
    before = Path("mine_config.json").read_bytes()
    assert main(["models", "new", "mine", "--base-model", "tiny_sdxl", "--targets", "*q_proj"]) == 2
    assert "exists; --overwrite replaces it" in capsys.readouterr().err
    assert Path("mine_config.json").read_bytes() == before
    assert len(targets_of(new("--base-model", "tiny_sdxl", "--targets", "*q_proj", "--overwrite"))["text_encoder"]) == 3


@pytest.mark.parametrize("verb", [["show"], ["new", "mine"], ["new", "mine", "--base-model"], ["shwo", "tiny_sdxl"]])
def test_a_verb_without_what_it_needs_is_refused(capsys: pytest.CaptureFixture[str], verb: list[str]) -> None:
    assert main(["models", *verb]) == 2
    assert capsys.readouterr().err.count("\n") == 1
