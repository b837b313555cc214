"""`lora-forge plugins list` and `lora-forge plugins show`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributions import LOSS, Site, pretend_site, write_plugin

from lora_forge import __version__
from lora_forge.cli.main import main

BUILTINS = {
    ("initializer", "gaussian"),
    ("initializer", "kaiming"),
    ("initializer", "orthogonal"),
    ("initializer", "gradient"),
    ("loss", "embedding_magnitude"),
    ("loss", "conditioning_magnitude"),
    ("loss", "embed_write"),
    ("loss", "embed_direction"),
    ("loss", "embed_preserve"),
    ("loss", "pooled_align"),
    ("loss", "prompt_contrast"),
    ("optimizer", "adamw"),
    ("saver", "safetensors"),
    ("saver", "diffusers"),
    ("saver", "peft"),
    ("backend", "sdxl"),
    ("backend", "sd15"),
    ("executor", "local"),
}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("COLUMNS", "200")
    with pretend_site(tmp_path, monkeypatch) as pretended:
        yield pretended


class Verb:
    """Runs `lora-forge plugins …` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def text(self, *arguments: str) -> str:
        """Its output, which must be the only one."""
        assert main(["plugins", *arguments]) == 0
        captured = self._capsys.readouterr()
        assert captured.err == ""
        return captured.out

    def json(self, *arguments: str) -> Any:
        return json.loads(self.text(*arguments, "--json"))

    def error(self, *arguments: str) -> str:
        """Its error; nothing else is printed, and the exit code is 2."""
        assert main(["plugins", *arguments]) == 2
        captured = self._capsys.readouterr()
        assert captured.out == ""
        assert "Traceback" not in captured.err
        return captured.err


@pytest.fixture
def plugins(site: Site, capsys: pytest.CaptureFixture[str]) -> Verb:
    return Verb(capsys)


def test_list_has_a_row_for_all_that_is_supplied(plugins: Verb) -> None:
    listed = plugins.json("list")
    assert {(row["kind"], row["name"]) for row in listed["plugins"]} == BUILTINS
    assert {(row["distribution"], row["version"], row["status"]) for row in listed["plugins"]} == {
        ("lora-forge", __version__, "ok")
    }
    assert all(row["summary"] for row in listed["plugins"])
    assert listed["broken"] == []
    text = plugins.text("list")
    assert all(any(kind in line and name in line for line in text.splitlines()) for kind, name in BUILTINS)


@pytest.mark.parametrize("kind", ["initializer", "loss", "optimizer", "saver", "backend", "executor"])
def test_list_can_be_of_one_kind(plugins: Verb, kind: str) -> None:
    listed = plugins.json("list", "--kind", kind)
    assert {(row["kind"], row["name"]) for row in listed["plugins"]} == {one for one in BUILTINS if one[0] == kind}


def test_an_unknown_kind_is_refused_with_the_known_ones(plugins: Verb) -> None:
    error = plugins.error("list", "--kind", "lose")
    assert len(error.splitlines()) == 1
    assert "'lose'" in error
    assert "'loss'" in error


def test_a_broken_plugin_is_a_row_with_its_reason_and_the_others_are_listed(site: Site, plugins: Verb) -> None:
    site.install("bad", "raise ValueError('no [bold]way[/nowhere]')", version="0.3")
    site.install("good", LOSS.format(name="small"), version="2.0")
    listed = plugins.json("list")
    assert listed["broken"] == [
        {"plugin": "bad:plugin", "version": "0.3", "error": "ValueError: no [bold]way[/nowhere]"}
    ]
    assert {(row["kind"], row["name"]) for row in listed["plugins"]} == BUILTINS | {("loss", "small")}
    (row,) = (line for line in plugins.text("list").splitlines() if "bad:plugin" in line)
    assert "bad:plugin 0.3" in row
    assert "broken" in row
    assert "ValueError: no [bold]way[/nowhere]" in row


def test_list_says_how_to_ask_for_a_name_that_is_not_ones_own(site: Site, plugins: Verb) -> None:
    site.install("first", LOSS.format(name="small"))
    site.install("second", LOSS.format(name="small"))
    site.install("rival", LOSS.format(name="embedding_magnitude"))
    rows = plugins.json("list", "--kind", "loss")["plugins"]
    own = {(row["name"], row["status"]) for row in rows if row["distribution"] == "lora-forge"}
    assert own == {(name, "ok") for kind, name in BUILTINS if kind == "loss"}
    rows = [row for row in rows if row["distribution"] != "lora-forge"]
    assert {(row["distribution"], row["name"], row["status"]) for row in rows} == {
        ("rival", "embedding_magnitude", "shadows nothing; call it rival:embedding_magnitude"),
        ("first", "small", "conflicts with second:small; call it first:small"),
        ("second", "small", "conflicts with first:small; call it second:small"),
    }


def test_list_and_show_take_plugin_files_too(site: Site, plugins: Verb) -> None:
    file = str(write_plugin(site.folder / "mine.py", LOSS.format(name="small")))
    assert ("mine", "small") in {
        (row["distribution"], row["name"]) for row in plugins.json("list", "--plugin", file)["plugins"]
    }
    assert plugins.json("show", "small", "--plugin", file)["distribution"] == "mine"


def test_show_gives_the_options_with_type_default_bounds_and_help(plugins: Verb) -> None:
    shown = plugins.json("show", "adamw")
    options = {option["name"]: option for option in shown.pop("options")}
    assert set(shown.pop("schema")["properties"]) == set(options)
    assert shown == {
        "kind": "optimizer",
        "name": "adamw",
        "distribution": "lora-forge",
        "version": __version__,
        "module": "lora_forge.builtin.optimizers",
        "summary": "torch's AdamW",
        "elementwise": True,
    }
    assert {name: (o["type"], o["default"]) for name, o in options.items()} == {
        "schedule": ("'constant' | 'linear' | 'cosine'", "constant"),
        "warmup": ("int", 0),
        "lr": ("float", 1e-4),
        "betas": ("(float, float)", [0.9, 0.999]),
        "eps": ("float", 1e-8),
        "weight_decay": ("float", 0.01),
    }
    assert options["lr"]["bounds"] == "> 0"
    assert options["lr"]["help"] == "learning rate"
    assert not options["lr"]["required"]
    text = plugins.text("show", "adamw")
    (row,) = (line for line in text.splitlines() if " lr " in line)
    assert "0.0001" in row
    assert "learning rate" in row
    assert f"from: lora-forge {__version__}, module lora_forge.builtin.optimizers" in text


def test_show_says_what_each_kind_has_of_its_own(plugins: Verb) -> None:
    loss = plugins.json("show", "embedding_magnitude")
    assert (loss["needs"], loss["source"]) == ("text", "ours")
    assert "mean(|last_hidden_state|)" in loss["formula"]
    assert plugins.json("show", "diffusers")["suffix"] == ".safetensors"
    backend = plugins.json("show", "sdxl")
    assert backend["components"] == ["text_encoder", "text_encoder_2", "unet"]
    assert backend["reaches"]["text"] == ["text_encoder", "text_encoder_2"]
    assert backend["conditioning"] == [
        "text_encoder penultimate",
        "text_encoder_2 penultimate",
        "text_encoder_2 pooled",
    ]
    other = plugins.json("show", "sd15")
    assert (other["components"], other["conditioning"]) == (["text_encoder", "unet"], ["text_encoder last"])
    assert "conditioning: ['text_encoder last']" in plugins.text("show", "sd15")
    for name in ("embedding_magnitude", "diffusers", "sdxl", "sd15", "gaussian"):
        assert plugins.text("show", name).startswith(f"{name} (")
    assert "options: none" in plugins.text("show", "diffusers")
    assert "penultimate" in plugins.text("show", "embedding_magnitude")


def test_show_tells_two_kinds_of_one_name_apart(site: Site, plugins: Verb) -> None:
    source = LOSS.format(name="adamw")
    site.install("other", source)
    assert [one["kind"] for one in plugins.json("show", "adamw")] == ["loss", "optimizer"]
    assert plugins.json("show", "adamw", "--kind", "loss")["distribution"] == "other"
    assert plugins.json("show", "other:adamw")["kind"] == "loss"
    assert plugins.json("show", "lora-forge:adamw")["kind"] == "optimizer"


def test_show_of_a_name_that_two_supply_says_how_to_pick(site: Site, plugins: Verb) -> None:
    site.install("first", LOSS.format(name="small"))
    site.install("second", LOSS.format(name="small"), version="2.0")
    assert plugins.error("show", "small") == (
        "lora-forge: error: 2 plugins supply the loss 'small'; say which: 'first:small' or 'second:small'\n"
    )
    assert plugins.json("show", "second:small")["version"] == "2.0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adamv"], "unknown plugin 'adamv'; did you mean 'adamw'?"),
        (
            ["adamw", "--kind", "loss"],
            f"unknown loss 'adamw'; known: {', '.join(sorted(name for kind, name in BUILTINS if kind == 'loss'))}",
        ),
        (["nobody:adamw"], "unknown plugin 'nobody:adamw'; did you mean 'lora-forge:adamw'?"),
    ],
)
def test_show_of_an_unknown_name_gives_the_nearest(plugins: Verb, arguments: list[str], message: str) -> None:
    assert plugins.error("show", *arguments) == f"lora-forge: error: {message}\n"


def test_show_of_an_unknown_name_names_the_broken_plugin_it_may_have_come_from(site: Site, plugins: Verb) -> None:
    site.install("bad", "raise ValueError('no way')")
    error = plugins.error("show", "wonder")
    assert "unknown plugin 'wonder'" in error
    assert error.endswith("it may have come from bad:plugin, which is broken: ValueError: no way\n")


def test_show_says_that_needs_may_depend_on_the_options_and_that_an_option_is_required(
    site: Site, plugins: Verb
) -> None:
    options = "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Options:\n    size: int\n"
    site.install(
        "odd",
        options
        + LOSS.format(name="small").replace(
            "factory=small", "factory=small, options=Options, needs=lambda o: {'text'}"
        ),
    )
    shown = plugins.json("show", "small")
    assert shown["needs"] == "depends on the options"
    assert shown["options"][0]["required"]
    (row,) = (line for line in plugins.text("show", "small").splitlines() if " size " in line)
    assert "required" in row


def test_what_a_plugin_prints_stays_out_of_the_json(
    site: Site, plugins: Verb, capsys: pytest.CaptureFixture[str]
) -> None:
    site.install("chatty", "print('here I am')\n" + LOSS.format(name="small"))
    assert main(["plugins", "list", "--json"]) == 0
    captured = capsys.readouterr()
    assert ("loss", "small") in {(row["kind"], row["name"]) for row in json.loads(captured.out)["plugins"]}
    assert captured.err == "here I am\n"
