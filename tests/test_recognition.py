"""Which backend knows a base model, where nobody has named one; and what a backend says of another family's model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_reader import open_pipeline
from distributions import Site, pretend_site
from refusals import refused
from safetensors.torch import save_file
from single_file_checkpoint import write_single_file

import lora_forge
from lora_forge.builtin.sd15.family import SD15
from lora_forge.builtin.sdxl.family import SDXL
from lora_forge.cli.main import main
from lora_forge.clip_unet.backend import ClipUnetBackend
from lora_forge.clip_unet.family import Family
from lora_forge.clip_unet.tiny import tiny_folder as made_tiny
from lora_forge.config.model import shipped_folder
from lora_forge.errors import ConfigError, ModelError
from lora_forge.plugins import attribute_named, discover
from lora_forge.recognition import recognized_backend
from lora_forge.records import BackendSpec

FULL_SIZE = {"sdxl": "sdxl_base", "sd15": "sd15"}
PLUGIN = """
from lora_forge import BackendSpec, hookimpl
from lora_forge.errors import ModelError

def recognizes(source):
    {body}

@hookimpl
def lora_forge_backends():
    yield BackendSpec(name="{name}", summary="toy", factory="json:loads", components=("a",), encoders=("a",){more})
"""
PROMPT = ("run", "--prompt", "an owl", "--dry-run")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one's own; no weights are read in any of these tests' command lines."""

    def no_weights(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(ClipUnetBackend, "load", no_weights)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def site(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with pretend_site(tmp_path_factory.mktemp("site"), monkeypatch) as made:
        yield made


def install(site: Site, distribution: str, body: str, name: str = "toy") -> None:
    site.install(distribution, PLUGIN.format(name=name, body=body, more=", recognizes=recognizes"))


def changed_copy(family: Family, path: Path, component: str, **changes: Any) -> Path:
    """A family's folder with other values in one component's config."""
    shutil.copytree(made_tiny(family), path, copy_function=os.symlink)
    file = path / component / "config.json"
    text = json.dumps(json.loads(file.read_text()) | changes)
    file.unlink()
    file.write_text(text)
    return path


def without_backend(model: str, path: Path, **changes: Any) -> Path:
    """A model config that ships, without the backend it names."""
    data = json.loads((shipped_folder() / f"{model}_config.json").read_text(encoding="utf-8")) | changes
    del data["backend"]
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["tiny model", "folder", "configs alone", "single file"])
def test_new_without_a_backend_picks_the_family_s_own(
    capsys: pytest.CaptureFixture[str], here: Path, family: Family, model: str, model_folder: Path, kind: str
) -> None:
    source: Any = {"tiny model": model, "folder": model_folder, "configs alone": family.configs}.get(kind)
    if kind == "single file":
        source = write_single_file(family.name, model_folder, here / "checkpoint.safetensors")
    assert main(["models", "new", "mine", "--base-model", str(source)]) == 0
    data = json.loads(Path("mine_config.json").read_text(encoding="utf-8"))
    assert data["backend"] == family.name
    assert {key for key in data if key.startswith("target_layers_")} == {
        f"target_layers_{c}" for c in family.components
    }


def test_a_model_config_without_a_backend_runs_with_the_one_that_recognizes_its_base_model(
    capsys: pytest.CaptureFixture[str], here: Path, family: Family, model: str, model_folder: Path
) -> None:
    config = without_backend(model, here / "mine.json")
    for more in ([], ["--base-model", str(model_folder)]):
        assert main([*PROMPT, "--model", str(config), "--json", *more]) == 0
        assert json.loads(capsys.readouterr().out)["backend"]["name"] == family.name


def test_the_base_model_decides_and_not_what_the_config_was_made_for(here: Path) -> None:
    config = without_backend("tiny_sd15", here / "mine.json", base_model="tiny_sdxl")
    with pytest.raises(ConfigError) as caught:
        lora_forge.run("an owl", str(config), iterations=1)
    assert "the real layer's is" in str(caught.value)  # the dimensions of an SDXL's text encoder


def test_a_model_config_with_neither_backend_nor_base_model_lacks_the_base_model(
    capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    config = without_backend("tiny_sd15", here / "mine.json", base_model=None)
    error = refused(capsys, *PROMPT, "--model", config)
    assert error == "base_model: model config 'mine' names none; give one\n"


def test_a_run_on_a_pipeline_needs_a_model_config_that_names_its_backend(here: Path, tiny_folder: Path) -> None:
    config = without_backend("tiny_sdxl", here / "mine.json")
    with pytest.raises(ConfigError, match="backend: model config 'mine' names none; give one"):
        lora_forge.run("an owl", str(config), pipeline=open_pipeline("sdxl", tiny_folder), iterations=1)


NO_SDXL = "is no SDXL: its UNet takes no pooled projection and no image size (addition_embed_type is not text_time)"
NO_SD15 = "is no Stable Diffusion 1.x: its UNet projects into its attention blocks with linear layers"
STRANGERS: list[tuple[str, tuple[str, ...]]] = [
    ("like_sd2", (f"sdxl: base model 'like_sd2' {NO_SDXL}", f"sd15: base model 'like_sd2' {NO_SD15}")),
    ("t5", (NO_SDXL, "is no Stable Diffusion 1.x: its text_encoder is of the kind 't5', not 'clip_text_model'")),
    ("lora.safetensors", ("is no SDXL: it has no 'conditioner", "is no Stable Diffusion 1.x: it has no 'cond_stage_")),
    ("empty", ("sdxl, sd15: base model 'empty' has no unet/config.json",)),
    ("weights.ckpt", ("only .safetensors checkpoints are read, never pickles",)),
    ("junk.safetensors", ("base model 'junk.safetensors' is broken or truncated",)),
    ("missing", ("sdxl, sd15: base model 'missing' does not exist",)),
]


def make_stranger(path: Path) -> None:
    """A source that no built-in backend knows."""
    if path.name == "like_sd2":
        changed_copy(SD15, path, "unet", use_linear_projection=True)
    elif path.name == "t5":
        changed_copy(SD15, path, "text_encoder", model_type="t5")
    elif path.name == "lora.safetensors":
        save_file({"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(1)}, path)
    elif path.name == "empty":
        path.mkdir()
    elif path.suffix:
        path.write_bytes(b"junk")


@pytest.mark.parametrize(("source", "reasons"), STRANGERS)
def test_what_no_backend_recognizes_is_an_error_with_the_reason_of_each(
    capsys: pytest.CaptureFixture[str], here: Path, source: str, reasons: tuple[str, ...]
) -> None:
    make_stranger(here / source)
    error = refused(capsys, "models", "new", "mine", "--base-model", source)
    assert error.startswith(f"no backend recognizes base model {source!r}; ")
    assert all(reason in error for reason in reasons), error
    assert len(error.splitlines()) == (1 if len(reasons) == 1 else 1 + len(reasons))
    assert not (here / "mine_config.json").exists()

    config = without_backend("tiny_sd15", here / "mine.json", base_model=source)
    assert refused(capsys, *PROMPT, "--model", config) == f"backend: {error}"


@pytest.mark.parametrize(
    ("backend", "source", "words"),
    [
        ("sd15", "like_sd2", NO_SD15),
        ("sd15", "tiny_sdxl", NO_SD15),
        ("sdxl", "tiny_sd15", NO_SDXL),
    ],
)
def test_a_backend_refuses_another_family_s_folder_and_says_what_is_different(
    capsys: pytest.CaptureFixture[str], here: Path, backend: str, source: str, words: str
) -> None:
    families = {"tiny_sdxl": SDXL, "tiny_sd15": SD15}
    folder = made_tiny(families[source]) if source in families else here / source
    if source not in families:
        make_stranger(folder)
    error = refused(capsys, "models", "new", "mine", "--base-model", folder, "--backend", backend)
    assert error.startswith(f"base model {folder.name!r} {words}")
    assert error.count("\n") == 1
    config = {"sdxl": "tiny_sdxl", "sd15": "tiny_sd15"}[backend]
    assert words in refused(capsys, *PROMPT, "--model", config, "--base-model", folder)


@pytest.mark.parametrize("mine", [SDXL, SD15])
def test_a_single_file_of_another_family_is_refused_before_its_weights_are_read(
    capsys: pytest.CaptureFixture[str], here: Path, mine: Family
) -> None:
    other = {"sdxl": SD15, "sd15": SDXL}[mine.name]
    file = write_single_file(other.name, made_tiny(other), here / "checkpoint.safetensors")
    config = FULL_SIZE[mine.name]
    error = refused(capsys, "run", "--prompt", "an owl", "--model", config, "--base-model", file, "-o", "owl")
    assert error.startswith(f"base model 'checkpoint.safetensors' is no {mine.title}: it has no ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("mine", "other", "words"),
    [
        (SD15, SDXL, "StableDiffusionXLPipeline is no Stable Diffusion 1.x pipeline: its UNet projects into"),
        (SDXL, SD15, "StableDiffusionPipeline is no SDXL pipeline: it has no text_encoder_2"),
    ],
)
def test_a_pipeline_of_another_family_is_refused_in_one_line(mine: Family, other: Family, words: str) -> None:
    pipe = open_pipeline(other.name, made_tiny(other))
    with pytest.raises(ModelError) as caught:
        lora_forge.run("an owl", mine.tiny.name, pipeline=pipe, iterations=1)
    assert str(caught.value).startswith(words)
    assert "\n" not in str(caught.value)


def test_a_backend_that_a_plugin_supplies_is_asked_like_a_built_in_one(site: Site) -> None:
    install(site, "toy-dist", 'return source == "toys/one"')
    assert recognized_backend("toys/one", discover()) == "toy"
    assert recognized_backend("tiny_sd15", discover()) == "sd15"


def test_a_name_that_does_not_tell_which_backend_is_meant_gets_its_distribution(site: Site) -> None:
    install(site, "one-dist", 'return source == "one"')
    install(site, "two-dist", 'return source == "two"')
    install(site, "third-dist", 'return source == "third"', name="sdxl")
    registry = discover()
    assert recognized_backend("one", registry) == "one-dist:toy"
    assert recognized_backend("two", registry) == "two-dist:toy"
    assert recognized_backend("third", registry) == "third-dist:sdxl"
    assert recognized_backend("tiny_sdxl", registry) == "sdxl"
    for source in ("one", "two", "third", "tiny_sdxl"):
        spec = registry.resolve("backend", recognized_backend(source, registry)).spec
        assert isinstance(spec, BackendSpec)
        assert attribute_named(spec.recognizes or "")(source)


def test_several_backends_that_recognize_a_model_are_named_and_one_has_to_be_chosen(
    capsys: pytest.CaptureFixture[str], site: Site, model_folder: Path, family: Family
) -> None:
    install(site, "greedy-dist", "return True")
    error = refused(capsys, "models", "new", "mine", "--base-model", model_folder)
    assert error.startswith(f"several backends recognize base model '{model_folder}'; say which ")
    assert error.endswith(f"'lora-forge:{family.name}' or 'greedy-dist:toy'\n")
    command = ["models", "new", "mine", "--base-model", str(model_folder), "--backend"]
    for name in (family.name, f"lora-forge:{family.name}"):
        assert main([*command, name, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('raise RuntimeError("out of\\n  luck")', "toy: RuntimeError: out of luck"),
        ("raise SystemExit(3)", "toy: SystemExit: 3"),
        ('raise ModelError("no toy:\\nit is made of wood")', "toy: no toy: it is made of wood"),
        ("return False", "toy: not one of its models"),
    ],
)
def test_a_plugin_s_backend_that_fails_or_says_no_ends_nothing_and_is_one_line_among_the_reasons(
    capsys: pytest.CaptureFixture[str], site: Site, body: str, reason: str
) -> None:
    install(site, "sour-dist", body)
    error = refused(capsys, "models", "new", "mine", "--base-model", "missing")
    assert error.splitlines()[1:] == ["  sdxl, sd15: base model 'missing' does not exist", f"  {reason}"]
    assert recognized_backend("tiny_sd15", discover()) == "sd15"


def test_a_recognizes_that_cannot_be_imported_is_a_reason_too(site: Site) -> None:
    site.install("lost-dist", PLUGIN.format(name="toy", body="pass", more=', recognizes="no_such_module_at_all:yes"'))
    with pytest.raises(ModelError, match="toy: ModuleNotFoundError: No module named 'no_such_module_at_all'"):
        recognized_backend("missing", discover())


def test_a_backend_that_cannot_tell_is_never_chosen_by_itself_and_is_named_among_the_reasons(site: Site) -> None:
    site.install("mute-dist", PLUGIN.format(name="mute", body="pass", more=""))
    assert recognized_backend("tiny_sdxl", discover()) == "sdxl"
    with pytest.raises(ModelError, match="name one that knows it") as caught:
        recognized_backend("missing", discover())
    assert "\n  mute: recognizes none by itself" in str(caught.value)
