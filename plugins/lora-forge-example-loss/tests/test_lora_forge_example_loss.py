"""The loss keeps lora-forge's contract, and does what it is for.

`check_plugin` and `tiny_run` are fixtures that lora-forge brings; both work on a tiny model made on the spot.
"""

from collections.abc import Callable
from typing import Any

import pytest
from lora_forge.testing import check_loss

from lora_forge_example_loss import Options, lora_forge_losses


@pytest.mark.parametrize("options", [Options(), Options(towards="a castle", keep=1.0)])
def test_it_keeps_the_contract_of_a_loss(options: Options) -> None:
    (spec,) = lora_forge_losses()
    check_loss(spec, options)


def test_it_keeps_it_installed_under_its_name(check_plugin: Callable[..., Any]) -> None:
    check_plugin("lean", kind="loss")


def test_a_run_starts_at_one_and_leans_towards_the_text(tiny_run: Callable[..., Any]) -> None:
    result = tiny_run("a steampunk owl", **settings(towards="a castle"))
    assert result.before.terms["lean"] == pytest.approx(1)
    assert result.after.terms["lean"] < 0.5


def test_what_is_kept_does_not_move_as_far(tiny_run: Callable[..., Any]) -> None:
    free, kept = (tiny_run("a steampunk owl", **settings(towards="a castle", keep=keep)) for keep in (0, 3))
    assert kept.effect.conditioning_shift < free.effect.conditioning_shift


def test_a_prompt_that_is_the_text_has_arrived(tiny_run: Callable[..., Any]) -> None:
    result = tiny_run("a castle", **settings(towards="a castle"))
    assert result.before.terms["lean"] == pytest.approx(0, abs=1e-6)


def settings(**options: Any) -> dict[str, Any]:
    """A short run with large steps, and this loss with these options."""
    loss = {"name": "lean", "options": options}
    return {"loss": loss, "optimizer": {"name": "adamw", "options": {"lr": 0.01}}, "iterations": 30}
