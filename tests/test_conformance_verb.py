"""`lora-forge plugins check`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributions import LOSS, Site, pretend_site, write_plugin

from lora_forge.cli.main import main
from lora_forge.testing import RULES

BROKEN = """
from dataclasses import dataclass
from lora_forge import LossSpec, SaverSpec, hookimpl

@dataclass(frozen=True)
class Options:
    size: float = 1.0

def one_number(batch, options):
    print("in the loss")
    total = sum(output.pooled.mean(1) for output in batch.adapted().values()) * options.size
    return total.mean() if options.size == 1 else total

def empty(request):
    pass

@hookimpl
def lora_forge_losses():
    yield LossSpec(name="mean", summary="one number for all", factory=one_number, options=Options)

@hookimpl
def lora_forge_savers():
    yield SaverSpec(name="mean", summary="writes nothing", factory=empty, options=Options)
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("COLUMNS", "200")
    with pretend_site(tmp_path, monkeypatch) as pretended:
        yield pretended


def check(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """What `plugins check` prints; with another exit code than 2, nothing goes to stderr."""
    assert main(["plugins", "check", *arguments]) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    if code == 2:
        assert captured.out == ""
        return captured.err
    assert captured.err == ""
    return captured.out


def test_a_plugin_that_keeps_its_contract_has_a_tick_for_each_rule(capsys: pytest.CaptureFixture[str]) -> None:
    lines = check(capsys, "gaussian").splitlines()
    rules = RULES["initializer"]
    assert lines[0] == "gaussian (initializer)"
    assert lines[1:-1] == [f"✓ {rule}: {promise}" for rule, promise in rules.items()]
    assert lines[-1] == f"{len(rules)} rules kept"


def test_an_installed_plugin_that_breaks_a_rule_has_a_cross_and_the_finding_and_exit_code_1(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.install("broken", BROKEN)
    lines = check(capsys, "mean", "--kind", "loss", code=1).splitlines()
    lines = [line for line in lines if line != "in the loss"]
    cross = lines.index(f"✗ shape: {RULES['loss']['shape']}")
    assert "not one value per prompt, (3,)" in lines[cross + 1]
    assert "✓ needs: " in "\n".join(lines)
    assert "– independent: not checked" in lines
    assert lines[-1] == "1 finding"


def test_a_name_of_two_kinds_is_checked_as_both_and_json_stands_alone(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.install("broken", BROKEN)
    assert main(["plugins", "check", "mean", "--json"]) == 1
    captured = capsys.readouterr()
    assert "in the loss" in captured.err
    told: list[dict[str, Any]] = json.loads(captured.out)
    found = {(one["kind"], one["name"]): [finding["rule"] for finding in one["findings"]] for one in told}
    assert found == {("loss", "mean"): ["shape"], ("saver", "mean"): ["one_file"]}
    assert all(set(one["checked"]) <= set(RULES[one["kind"]]) for one in told)


def test_a_plugin_file_is_checked_with_the_options_given(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write_plugin(site.folder / "mine.py", BROKEN))
    told = ["mine:mean", "--kind", "loss", "--plugin", file, "--json"]
    assert main(["plugins", "check", *told]) == 1
    capsys.readouterr()
    assert main(["plugins", "check", *told, "--opt", "size=2"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["findings"] == []
    assert set(record["checked"]) == set(RULES["loss"])


def test_a_good_installed_plugin_is_checked_by_its_qualified_name(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.install("fine-losses", LOSS.format(name="small"))
    assert check(capsys, "fine-losses:small").splitlines()[-1] == f"{len(RULES['loss'])} rules kept"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gausian"], ["unknown plugin 'gausian'", "did you mean 'gaussian'?"]),
        (["adamw", "--kind", "loss"], ["unknown loss 'adamw'"]),
        (["adamw", "--opt", "lr"], ["--opt takes KEY=VALUE, got 'lr'"]),
        (["adamw", "--opt", "lr=fast"], ["adamw.lr", "expected a number"]),
        (["adamw", "--opt", "rate=1"], ["adamw.rate", "unknown option"]),
        (["adamw", "--plugin", "gone.py"], ["'gone.py' does not exist"]),
    ],
)
def test_what_cannot_be_checked_is_an_error_of_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    error = check(capsys, *arguments, code=2)
    assert len(error.splitlines()) == 1
    assert [word for word in words if word not in error] == []


def test_a_required_option_that_is_not_given_is_an_error_that_names_it(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(write_plugin(site.folder / "mine.py", BROKEN.replace("size: float = 1.0", "size: float")))
    error = check(capsys, "mean", "--kind", "loss", "--plugin", file, code=2)
    assert "mean.size: is required" in error
