"""Fixtures for the tests of plugins, there wherever lora-forge is installed: `check_plugin` and `tiny_run`.

pytest imports this module at every start, so that nothing heavy is imported before a fixture is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from lora_forge.result import RunResult


@pytest.fixture
def check_plugin() -> Callable[..., None]:
    """Checks an installed plugin by name against its contract, as `lora-forge plugins check` does.

    ```python
    def test_it_keeps_its_contract(check_plugin):
        check_plugin("my_loss", kind="loss", weight=2.0)
    ```

    `(name, kind=None, **options)`; without a kind, every plugin of that name. Raises
    `lora_forge.testing.NotConforming` with everything found, PluginError for an unknown name, ConfigError for
    options that it does not have.
    """

    def check(name: str, kind: str | None = None, **options: Any) -> None:
        from lora_forge.plugins import discover
        from lora_forge.testing.named import examine_named

        for examination in examine_named(discover(), name, kind, options):
            examination.require()

    return check


@pytest.fixture
def tiny_run() -> Callable[..., RunResult]:
    """Makes a LoRA on `tiny_sdxl` in 2 steps, with the plugins that are installed.

    ```python
    def test_a_run_with_it_ends_well(tiny_run):
        assert tiny_run(loss="my_loss").loss_after < 1
    ```

    `(prompt="a steampunk owl", **settings)`; settings are those of `lora_forge.run`, `iterations` among them.
    """

    def run(prompt: str = "a steampunk owl", **settings: Any) -> RunResult:
        import lora_forge

        return lora_forge.run(prompt, **{"model": "tiny_sdxl", "iterations": 2, **settings})

    return run
