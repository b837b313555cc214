"""Files of a model family that a plugin's backend knows, and whose layers have the names of another family's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributions import Site, pretend_site, write_plugin
from layer_files import Layers, metadata_of, named, random_layers, read_layers, save_diffusers, save_universal
from refusals import refused

from lora_forge.cli.main import main

PLUGIN = """
from pathlib import Path
from lora_forge import BackendSpec, FileLayout, hookimpl

Path("imported").touch()

@hookimpl
def lora_forge_backends():
    yield BackendSpec(
        name="{name}", summary="toys", factory="nowhere:Toy", components=("text_encoder", "unet"),
        encoders=("text_encoder",), reaches={{"text": ("text_encoder",)}}, layout={layout},
    )
"""
SAME_PREFIXES = """FileLayout(
            prefixes={"text_encoder": "lora_te", "unet": "lora_unet"},
            metadata={"ss_base_model_version": "toy_v1", "modelspec.architecture": "toy/lora"},
        )"""
OWN_PREFIXES = """FileLayout(prefixes={"text_encoder": "lora_te_toy", "unet": "lora_toy"})"""
RECORD = {"lora_forge": json.dumps({"run": {"backend": {"name": "toy", "distribution": "toys"}, "prompt": "a bear"}})}
TOY_V1 = {"ss_base_model_version": "toy_v1"}
BOTH = RECORD | {"ss_base_model_version": "sd_v1"}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    with pretend_site(tmp_path, monkeypatch) as pretended:
        yield pretended


@pytest.fixture
def toys(site: Site) -> Site:
    site.install("toys", PLUGIN.format(name="toy", layout=SAME_PREFIXES))
    return site


@pytest.fixture(scope="module")
def layers() -> Layers:
    return random_layers("tiny_sd15", alpha=4.0)


def told(capsys: pytest.CaptureFixture[str], path: Path, *options: str) -> dict[str, Any]:
    """What `inspect --json` says of a file."""
    capsys.readouterr()
    assert main(["inspect", "--headers", "--json", str(path), *options]) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    return {key: answer[key] for key in ("family", "backend")}


@pytest.mark.parametrize("metadata", [RECORD, TOY_V1, BOTH], ids=["record", "metadata", "record before metadata"])
def test_a_file_is_of_the_family_that_its_record_or_its_metadata_names_whatever_its_layers_are_called(
    metadata: dict[str, str], toys: Site, layers: Layers, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_universal(toys.folder / "bear.safetensors", "sd15", layers, metadata)
    assert told(capsys, path) == {"family": "toy", "backend": "toy"}


def test_metadata_goes_before_names_of_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers = random_layers("tiny_sdxl", alpha=4.0)
    path = save_universal(tmp_path / "a.safetensors", "sdxl", layers, {"ss_base_model_version": "sd_v2"})
    assert told(capsys, path) == {"family": "sd2", "backend": None}


def test_a_family_whose_backend_is_not_here_is_told_and_its_plugin_never_looked_for(
    site: Site, layers: Layers, capsys: pytest.CaptureFixture[str]
) -> None:
    write_plugin(site.folder / "toys.py", PLUGIN.format(name="toy", layout=SAME_PREFIXES))
    path = save_universal(site.folder / "bear.safetensors", "sd15", layers, RECORD)
    assert told(capsys, path) == {"family": "toys:toy", "backend": None}
    assert main(["inspect", "--headers", str(path)]) == 0
    assert "toys:toy, of a backend that is not installed here" in capsys.readouterr().out
    error = refused(capsys, "convert", path, "out", "--to", "safetensors")
    assert error == refused(capsys, "merge", path, "-o", "out")
    assert "it is a LoRA of toys:toy, of a backend that is not installed here" in error
    assert "install it, or load it with --plugin FILE.py; or --family sd15 or sdxl says" in error
    assert not Path("imported").exists()
    assert not Path("out.safetensors").exists()
    assert told(capsys, path, "--plugin", "toys.py") == {"family": "toy", "backend": "toy"}
    assert Path("imported").exists()


@pytest.mark.parametrize("verb", [("convert", "bear.safetensors", "out"), ("merge", "bear.safetensors", "-o", "out")])
def test_names_of_layers_and_metadata_of_what_is_written_are_the_family_s_own(
    verb: tuple[str, ...], toys: Site, layers: Layers, capsys: pytest.CaptureFixture[str]
) -> None:
    save_diffusers(toys.folder / "bear.safetensors", layers, RECORD)
    assert main([*verb, "--to", "safetensors"]) == 0
    written = Path("out.safetensors")
    assert metadata_of(written).items() >= {**TOY_V1, "modelspec.architecture": "toy/lora"}.items()
    assert read_layers(written, "sd15", layers).keys() == layers.keys()
    assert told(capsys, written) == {"family": "toy", "backend": "toy"}


def test_a_family_that_only_the_user_knows_is_kept_in_the_file(
    site: Site, layers: Layers, capsys: pytest.CaptureFixture[str]
) -> None:
    plugin = write_plugin(site.folder / "toys.py", PLUGIN.format(name="toy", layout=OWN_PREFIXES))
    source = save_diffusers(site.folder / "bear.safetensors", layers, {})
    options = ("--plugin", str(plugin))
    assert main(["convert", str(source), "a", "--to", "safetensors", "--family", "toy", *options]) == 0
    assert told(capsys, Path("a.safetensors")) == {"family": "toys:toy", "backend": None}
    assert told(capsys, Path("a.safetensors"), *options) == {"family": "toy", "backend": "toy"}
    assert main(["merge", "a.safetensors", "a.safetensors:0.5", "-o", "b", *options]) == 0
    assert told(capsys, Path("b.safetensors"), *options) == {"family": "toy", "backend": "toy"}


def test_names_with_a_family_s_own_prefixes_come_back_as_they_were(
    site: Site, layers: Layers, capsys: pytest.CaptureFixture[str]
) -> None:
    plugin = write_plugin(site.folder / "toys.py", PLUGIN.format(name="toy", layout=OWN_PREFIXES))
    source = save_diffusers(site.folder / "bear.safetensors", layers, RECORD)
    options = ("--plugin", str(plugin))
    assert main(["convert", str(source), "there", "--to", "safetensors", *options]) == 0
    assert main(["convert", "there.safetensors", "back", "--to", "diffusers", *options]) == 0
    assert read_layers(Path("back.safetensors"), "sd15", layers).keys() == layers.keys()
    capsys.readouterr()
    assert main(["inspect", "there.safetensors", "--layers", *options]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"│ text_encoder +│ text_model\.encoder\.layers\.0\.self_attn\.k_proj ", printed)
    assert re.search(r"│ unet +│ mid_block\.attentions\.0\.", printed)


def test_a_family_can_stand_for_one_that_is_not_here_and_files_of_two_are_not_merged(
    toys: Site, layers: Layers, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = {"lora_forge": RECORD["lora_forge"].replace('"toys"', '"older-toys"')}
    one = save_universal(toys.folder / "one.safetensors", "sd15", layers, elsewhere)
    two = save_universal(toys.folder / "two.safetensors", "sd15", layers, RECORD)
    assert "of different families" in refused(capsys, "merge", one, two, "-o", "out")
    assert "is a LoRA of toy, not of sd15" in refused(capsys, "merge", one, two, "-o", "out", "--family", "sd15")
    assert main(["merge", str(one), str(two), "-o", "out", "--family", "toy"]) == 0
    assert told(capsys, named(Path("out"), "safetensors")) == {"family": "toy", "backend": "toy"}


def test_a_backend_with_the_name_of_one_that_ships_is_told_by_its_distribution(
    site: Site, layers: Layers, capsys: pytest.CaptureFixture[str]
) -> None:
    site.install("toys", PLUGIN.format(name="sd15", layout=SAME_PREFIXES))
    record = {"lora_forge": RECORD["lora_forge"].replace('"toy"', '"sd15"')}
    path = save_universal(site.folder / "bear.safetensors", "sd15", layers, record)
    assert told(capsys, path) == {"family": "toys:sd15", "backend": "toys:sd15"}


@pytest.mark.parametrize(
    "backend", [7, {}, {"name": "toy"}, {"name": 7, "distribution": "toys"}, {"name": "x y", "distribution": "toys"}]
)
def test_a_record_that_names_no_backend_legibly_tells_nothing(
    backend: Any, tmp_path: Path, layers: Layers, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"lora_forge": json.dumps({"run": {"backend": backend}})}
    path = save_universal(tmp_path / "a.safetensors", "sd15", layers, record)
    assert told(capsys, path) == {"family": "sd15", "backend": "sd15"}


def test_a_file_of_a_family_that_ships_loads_no_plugin(
    toys: Site, layers: Layers, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_universal(toys.folder / "a.safetensors", "sd15", layers, {"ss_base_model_version": "sd_v1"})
    assert told(capsys, path) == {"family": "sd15", "backend": "sd15"}
    assert main(["convert", str(path), "out", "--to", "peft"]) == 0
    assert not Path("imported").exists()
    assert told(capsys, path, "--strict-plugins") == {"family": "sd15", "backend": "sd15"}
    assert Path("imported").exists()
