"""A wheel of the project, installed outside the checkout, works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent
PROBE = """
import json, sys
import lora_forge
from lora_forge.config.model import shipped_folder
from lora_forge.builtin.sd15.family import SD15
from lora_forge.builtin.sdxl.family import SDXL
print(json.dumps([lora_forge.__file__, *map(str, (shipped_folder(), SDXL.configs, SD15.configs))]))
"""

CONFIGS = {
    "sdxl": ("tokenizer/vocab.json", "tokenizer_2/merges.txt", "unet/config.json", "NOTICE.md"),
    "sd15": ("tokenizer/vocab.json", "tokenizer/merges.txt", "unet/config.json", "NOTICE.md"),
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--wheel-dir", folder, CHECKOUT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return target


def outside(installed: Path, folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python with the installed package first on its path, in a folder that is not the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_wheel_holds_the_package_its_configs_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"lora_forge"}
    for config in (CHECKOUT / "model_config").glob("*.json"):
        assert f"lora_forge/model_config/{config.name}" in names
    for family, files in CONFIGS.items():
        folder = f"lora_forge/builtin/{family}/configs"
        there = [path for path in (CHECKOUT / folder).rglob("*") if path.is_file()]
        assert {path.relative_to(CHECKOUT).as_posix() for path in there} <= set(names)
        assert {f"{folder}/{name}" for name in files} <= set(names)
        assert any(name.endswith(f"licenses/{folder}/NOTICE.md") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    templates = CHECKOUT / "lora_forge" / "scaffold" / "templates"
    for path in templates.rglob("*.tmpl"):
        assert f"lora_forge/scaffold/templates/{path.relative_to(templates).as_posix()}" in names
    assert not any(Path(name).name.startswith("test_") or name.endswith(".pyc") for name in names)


def test_every_module_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(CHECKOUT).as_posix() for path in (CHECKOUT / "lora_forge").rglob("*.py")}
    assert modules <= names


def test_the_installed_package_runs_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    probe = outside(installed, tmp_path, "-c", PROBE)
    assert probe.returncode == 0, probe.stderr
    assert [Path(path).is_relative_to(installed) for path in json.loads(probe.stdout)] == [True] * 4

    listed = outside(installed, tmp_path, "-m", "lora_forge", "models", "list")
    assert listed.returncode == 0, listed.stderr
    for config in (CHECKOUT / "model_config").glob("*_config.json"):
        assert config.name.removesuffix("_config.json") in listed.stdout

    command = ["-m", "lora_forge", "run", "--prompt", "an owl", "--model", "tiny_sdxl", "--iterations", "2", "--json"]
    done = outside(installed, tmp_path, *command, "--output", tmp_path / "owl.safetensors")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert Path(report["path"]) == tmp_path / "owl.safetensors"
    assert (tmp_path / "owl.safetensors").stat().st_size > 10_000
    assert report["after"]["loss"] < report["before"]["loss"]
