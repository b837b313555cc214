"""The plugins in `plugins/`, installed by pip from wheels like anyone's, all in one environment."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from docs_pages import CHECKOUT, blocks, commands
from docs_shell import Shell
from fresh_environment import FreshEnvironment

FOLDERS = sorted(path.parent for path in (CHECKOUT / "plugins").glob("*/pyproject.toml"))
each_plugin = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A wheel of each, built by pip from a copy."""
    target, copies = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("copies")
    sources = [str(shutil.copytree(folder, copies / folder.name)) for folder in FOLDERS]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, *offline, "-w", str(target), *sources], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return sorted(target.glob("*.whl"))


@pytest.fixture(scope="session")
def environment(wheels: list[Path], tmp_path_factory: pytest.TempPathFactory) -> FreshEnvironment:
    made = FreshEnvironment.make(tmp_path_factory.mktemp("first_party") / "environment")
    made.install(*wheels)
    return made


@pytest.mark.slow
def test_none_is_broken_and_none_is_slow_with_all_of_them_installed(environment: FreshEnvironment) -> None:
    listed = environment.run("plugins", "list", "--strict-plugins", env={"COLUMNS": "200"}, warm=False)
    assert listed.returncode == 0, listed.stderr
    assert [folder.name for folder in FOLDERS if folder.name not in listed.stdout] == []
    assert "slow" not in listed.stdout
    assert listed.stderr == ""


@pytest.mark.slow
@each_plugin
def test_its_own_tests_pass_where_it_was_installed(folder: Path, environment: FreshEnvironment, tmp_path: Path) -> None:
    # The tests alone, beside nothing: what they import is what was installed.
    shutil.copytree(folder / "tests", tmp_path / "tests")
    done = environment.execute("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", cwd=tmp_path, warm=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@each_plugin
def test_every_command_and_block_of_its_readme_works(
    folder: Path, environment: FreshEnvironment, tmp_path: Path
) -> None:
    shell = Shell(environment, tmp_path)
    for block in blocks(folder / "README.md"):
        if block.language != "bash":
            shell.follow([block])
            continue
        # It is installed already, and its tests are run above.
        for line in commands(block):
            if not line.startswith(("pip ", "pytest")):
                shell.run(line, str(block))


@each_plugin
def test_it_has_a_readme_a_license_and_an_entry_point_and_says_which_api_it_is_for(folder: Path) -> None:
    assert (folder / "README.md").is_file()
    assert "[project.entry-points.lora_forge]" in (folder / "pyproject.toml").read_text(encoding="utf-8")
    assert "license" in (folder / "pyproject.toml").read_text(encoding="utf-8")
    modules = "".join(path.read_text(encoding="utf-8") for path in folder.glob("lora_forge_*/*.py"))
    assert "__lora_forge_api__ = 1" in modules


def test_each_is_in_the_list_of_plugins_with_a_link() -> None:
    listed = (CHECKOUT / "plugins" / "README.md").read_text(encoding="utf-8")
    assert [folder.name for folder in FOLDERS if f"[{folder.name}]({folder.name}/README.md)" not in listed] == []
