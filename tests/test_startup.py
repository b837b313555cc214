"""Helping, listing, showing and refusing import nothing heavy; a run imports what it runs, and no more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fresh_environment import FreshEnvironment
from plugin_scenarios import well_made

from lora_forge.builtin.sdxl.backend import SdxlBackend
from lora_forge.contracts import BackendRequest

HEAVY = ("torch", "transformers", "diffusers", "peft", "safetensors", "numpy")
RIGHT = (
    "--help",
    "--version",
    "plugins --help",
    "plugins list",
    "plugins list --json",
    "plugins show adamw",
    "plugins show sdxl",
    "plugins show sd15",
    "models list",
    "run --help",
)
WRONG = (
    "run --prompt owl --model no_such_model",
    "run --prompt owl --model tiny_sdxl --loss no_such_loss",
    "run --prompt owl --model tiny_sdxl --output .",
    "run --prompt owl --model tiny_sd15 --loss no_such_loss",
)
COMMANDS = RIGHT + WRONG
# One process for all of them, in order: what one imports is held against it, and against those after it.
SCRIPT = f"""
import contextlib, io, json, sys
seen = {{}}
def note(name, code=0):
    seen[name] = [code, sorted(m for m in sys.modules if m.partition(".")[0] in {(*HEAVY, "lora_forge", "rich")!r})]
import lora_forge
note("import lora_forge")
lora_forge.hookimpl, lora_forge.LossSpec
note("the names a plugin needs")
from lora_forge.cli.main import main
for command in {COMMANDS!r}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = main(command.split())
    note(command, code)
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def seen() -> dict[str, tuple[int, list[str]]]:
    """By command, its exit code and the heavy and own modules imported by then, in a fresh process."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=True)
    result: dict[str, tuple[int, list[str]]] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("name", ["import lora_forge", "the names a plugin needs", *COMMANDS])
def test_nothing_heavy_is_imported_to_help_to_list_or_to_refuse(
    seen: dict[str, tuple[int, list[str]]], name: str
) -> None:
    code, modules = seen[name]
    assert [module for module in modules if module.partition(".")[0] in HEAVY] == []
    assert code == (2 if name in WRONG else 0)


def test_importing_the_package_imports_no_other_module_of_it(seen: dict[str, tuple[int, list[str]]]) -> None:
    assert seen["import lora_forge"][1] == ["lora_forge"]


def test_help_imports_no_verb_and_no_plugin(seen: dict[str, tuple[int, list[str]]]) -> None:
    assert set(seen["--help"][1]) - set(seen["the names a plugin needs"][1]) == {
        "lora_forge.cli",
        "lora_forge.cli.main",
        "lora_forge.cli.verbs",
        "lora_forge.errors",
    }


def test_help_and_the_list_import_nothing_heavy_with_twenty_plugins_installed(tmp_path: Path) -> None:
    environment = FreshEnvironment.make(tmp_path / "environment")
    environment.install(*well_made(tmp_path, 20))
    script = """
import json, sys
from lora_forge.cli.main import main
code = main(sys.argv[1:])
print(json.dumps([code, sorted(sys.modules)]))
"""
    for arguments, plugins in (("--help",), 0), (("plugins", "list"), 20):
        done = environment.execute("-c", script, *arguments)
        code, modules = json.loads(done.stdout.splitlines()[-1])
        assert code == 0, done.stderr
        assert [module for module in modules if module.partition(".")[0] in HEAVY] == []
        # The list imported them all, and of each no more than the module its entry point names.
        assert len([m for m in modules if m.startswith("forge_wonder_") and m.endswith(".plugin")]) == plugins
        assert not [m for m in modules if m.startswith("forge_wonder_") and m.endswith(".loss")]


def test_a_run_that_needs_no_unet_imports_neither_diffusers_nor_what_makes_pages_and_pictures(
    tiny_folder: Path, tmp_path: Path
) -> None:
    SdxlBackend.open(BackendRequest(str(tiny_folder), "cpu", "float32")).architecture()  # kept from here on
    script = """
import json, sys
from lora_forge.cli.main import main
code = main(sys.argv[1:])
print(json.dumps([code, sorted(sys.modules)]))
"""
    run = [
        "run",
        "--prompt",
        "owl",
        "--model",
        "tiny_sdxl",
        "--iterations",
        "1",
        "-o",
        str(tmp_path / "owl.safetensors"),
    ]
    done = subprocess.run([sys.executable, "-c", script, *run], capture_output=True, text=True, timeout=300, check=True)
    code, modules = json.loads(done.stdout.splitlines()[-1])
    assert code == 0, done.stderr
    assert {"torch", "transformers.models.clip.modeling_clip", "peft"} <= set(modules)
    assert {"diffusers", "plotly", "upath"} & set(modules) == set()
    rooms = ("lora_forge.pages", "lora_forge.preview", "lora_forge.conversion", "lora_forge.inspection")
    assert [module for module in modules if module.startswith(rooms)] == []
