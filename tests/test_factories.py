"""A spec's factory, and plugins that are one file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributions import LOSS, Site, pretend_site, write_plugin
from safetensors import safe_open

import lora_forge
from lora_forge.cli.main import main
from lora_forge.errors import ConfigError, PluginError
from lora_forge.plugins import Supplied, build, discover


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with pretend_site(tmp_path, monkeypatch) as pretended:
        yield pretended


# Factories

FACTORIES = """
from dataclasses import dataclass
from lora_forge import SaverSpec, hookimpl

@dataclass(frozen=True)
class Options:
    size: int = 3

class Thing:
    def __init__(self, options):
        self.options = options
    def __call__(self, request):
        return ("thing", request, self.options.size)

class Bare:
    def __call__(self, request):
        return ("bare", request)

def plain(request):
    return ("plain", request)

def sized(request, options):
    return ("sized", request, options.size)

def leave():
    raise SystemExit(4)

class Leaving:
    def __init__(self, options):
        raise SystemExit(4)

number = 5

@hookimpl
def lora_forge_savers():
    for name, factory in {table}.items():
        yield SaverSpec(name=name, summary="s", factory=factory, options=Options)
"""


def saver(site: Site, factory: str) -> Supplied:
    site.install("makers", FACTORIES.replace("{table}", f"{{'made': {factory}}}"))
    registry = discover()
    assert registry.broken == []
    return registry.resolve("saver", "made")


@pytest.mark.parametrize("dotted", [True, False], ids=["dotted", "callable"])
@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        ("Thing", ("thing", "request", 8)),
        ("Bare", ("bare", "request")),
        ("plain", ("plain", "request")),
        ("sized", ("sized", "request", 8)),
    ],
)
def test_a_factory_is_a_class_made_with_the_options_or_a_function_that_may_take_them(
    site: Site, factory: str, expected: tuple[object, ...], dotted: bool
) -> None:
    supplied = saver(site, f"'makers_module:{factory}'" if dotted else factory)
    assert build(supplied, supplied.spec.options(size=8))("request") == expected


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("'not_there_module:Thing'", "ModuleNotFoundError: No module named 'not_there_module'"),
        ("'makers_module:Thong'", "AttributeError: module 'makers_module' has no attribute 'Thong'"),
        ("'makers_module:number'", "TypeError: 5 is not a callable object"),
        ("'leaving_module:Thing'", "SystemExit: 9"),
        ("Leaving", "SystemExit: 4"),
    ],
)
def test_a_factory_that_cannot_be_built_is_an_error_that_names_the_plugin(
    site: Site, factory: str, reason: str
) -> None:
    (site.folder / "leaving_module.py").write_text("raise SystemExit(9)")
    supplied = saver(site, factory)
    with pytest.raises(PluginError) as caught:
        build(supplied, supplied.spec.options())
    assert str(caught.value) == f"saver 'makers:made' cannot be built: {reason}"


def test_a_needs_function_that_raises_is_an_error_that_names_the_plugin(site: Site) -> None:
    source = LOSS.format(name="small").replace("factory=small", "factory=small, needs=lambda options: options.size")
    site.install("needy", source)
    with pytest.raises(ConfigError, match="loss 'needy:small' cannot say what it needs: Attr"):
        lora_forge.run("an owl", "tiny_sdxl", loss="small")


# Plugin files


def test_a_loss_from_a_file_runs_and_the_result_says_who_supplied_it(site: Site) -> None:
    file = write_plugin(site.folder / "mine.py", LOSS.format(name="small"))
    result = lora_forge.run("an owl", "tiny_sdxl", iterations=2, loss="small", plugins=[file])
    assert set(result.steps[0].terms) == {"small"}
    (term,) = json.loads(result.metadata["lora_forge"])["run"]["loss"]
    assert term["distribution"] == "mine"
    assert term["version"] == "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def test_the_command_line_runs_a_loss_from_a_file_whose_metadata_holds_no_path(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_plugin(site.folder / "mine.py", LOSS.format(name="small"))
    output = site.folder / "out.safetensors"
    arguments = ["--prompt", "an owl", "--model", "tiny_sdxl", "--iterations", "2", "-o", str(output)]
    assert main(["run", *arguments, "--plugin", str(file), "--loss", "mine:small", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["steps"][0]["terms"]) == {"small"}
    with safe_open(output, "pt") as opened:
        (term,) = json.loads(opened.metadata()["lora_forge"])["run"]["loss"]
    assert term["version"] == "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    assert str(site.folder) not in output.read_bytes().decode("latin-1")


@pytest.mark.parametrize(
    ("name", "source", "reason"),
    [
        ("gone.py", None, "does not exist"),
        ("bad.py", "raise ValueError('no way')", "ValueError: no way"),
        ("bad.py", "import sys; sys.exit()", "SystemExit"),
        ("bad.txt", "", "not a Python file"),
    ],
)
def test_a_plugin_file_that_cannot_be_used_is_an_error_since_it_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, source: str | None, reason: str
) -> None:
    file = tmp_path / name
    if source is not None:
        file.write_text(source)
    assert main(["run", "--prompt", "an owl", "--model", "tiny_sdxl", "--plugin", str(file)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert str(file) in error
    assert reason in error


def test_two_plugin_files_of_one_name_are_an_error_that_says_so(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_plugin(tmp_path / folder / "mine.py", LOSS.format(name=f"small_{folder}"))
    with pytest.raises(PluginError, match="another plugin file is named 'mine' too"):
        discover([tmp_path / "a" / "mine.py", tmp_path / "b" / "mine.py"])
