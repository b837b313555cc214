"""The pytest plugin: fixtures for the tests of plugins."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from distributions import LOSS, Site, pretend_site

from lora_forge.errors import ConfigError, PluginError
from lora_forge.testing import NotConforming

TESTS = """
import pytest
from lora_forge.testing import NotConforming

def test_nothing_heavy_is_imported_at_the_start():
    import sys
    assert not {"torch", "transformers", "diffusers", "peft"} & set(sys.modules)

def test_small(check_plugin):
    check_plugin("small")

def test_broken(check_plugin):
    check_plugin("constant", kind="loss")

def test_a_run(tiny_run):
    result = tiny_run("a castle", loss="small")
    assert len(result.steps) == 2
    assert result.run.prompt == "a castle"
"""
CONSTANT = """
from lora_forge import LossSpec, hookimpl

def constant(batch):
    import torch
    return torch.zeros(batch.prompts)

@hookimpl
def lora_forge_losses():
    yield LossSpec(name="constant", summary="nothing to train", factory=constant)
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with pretend_site(tmp_path, monkeypatch) as pretended:
        yield pretended


def test_a_plugins_own_tests_have_the_fixtures_without_asking_and_show_findings(site: Site, cache_folder: Path) -> None:
    site.install("smalls", LOSS.format(name="small"))
    site.install("constants", CONSTANT)
    file = site.folder / "test_my_plugin.py"
    file.write_text(dedent(TESTS))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        cwd=site.folder,
        env={**os.environ, "PYTHONPATH": str(site.folder), "LORA_FORGE_CACHE": str(cache_folder)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "1 failed, 3 passed" in done.stdout, done.stdout + done.stderr
    assert "NotConforming: loss 'constant' breaks a rule of its contract:" in done.stdout
    assert "differentiable: its value has no gradient" in done.stdout


def test_the_entry_point_is_the_plugin() -> None:
    (entry,) = entry_points(group="pytest11", name="lora_forge")
    assert entry.value == "lora_forge.testing.pytest_plugin"


def test_check_plugin_checks_an_installed_plugin_with_options(site: Site, check_plugin: Callable[..., None]) -> None:
    site.install("constants", CONSTANT)
    check_plugin("adamw", lr=0.01, betas=(0.5, 0.9), schedule="cosine")
    check_plugin("gaussian", kind="initializer", std=2.0)
    with pytest.raises(NotConforming, match="loss 'constant' breaks a rule"):
        check_plugin("constant")
    with pytest.raises(PluginError, match="unknown loss 'adamw'"):
        check_plugin("adamw", kind="loss")
    with pytest.raises(ConfigError, match=r"adamw\.lr: must be > 0"):
        check_plugin("adamw", lr=-1.0)


def test_tiny_run_is_a_run_of_two_steps_unless_told_otherwise(tiny_run: Callable[..., Any]) -> None:
    result = tiny_run()
    assert (result.run.prompt, result.run.model, len(result.steps)) == ("a steampunk owl", "tiny_sdxl", 2)
    assert len(tiny_run("a castle", iterations=3, seed=5).steps) == 3
    assert tiny_run(model="tiny_sd15").run.model == "tiny_sd15"
