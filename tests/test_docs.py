"""README.md and docs/: every command and code block works, and nothing that exists goes unmentioned."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from docs_pages import (
    ACCEPTANCE,
    CHECKOUT,
    DOCS,
    EXECUTED,
    PAGES,
    SETUP,
    SHOWN_ONLY,
    Reader,
    blocks,
    commands,
    make_full_size_folders,
)

import lora_forge
from lora_forge import contracts, hookspecs
from lora_forge.builtin.backends import lora_forge_backends
from lora_forge.config.model import read_model_config, shipped_names
from lora_forge.events import RunFailure, RunFinish, RunInfo, RunStart, StepFinish
from lora_forge.files.names import universal_name
from lora_forge.hookspecs import EXTENSION_POINTS, LIFECYCLE_EVENTS
from lora_forge.records import Spec

README, USAGE, PLUGINS, EVENTS = (
    CHECKOUT / "README.md",
    *(DOCS / name for name in ("usage.md", "plugins.md", "extend/events.md")),
)
WRITING_A_BACKEND = DOCS / "extend" / "writing-a-backend.md"
PAGE_OF_KIND = {kind: DOCS / "extend" / f"{kind}{'es' if kind.endswith('s') else 's'}.md" for kind in EXTENSION_POINTS}
ALL_BLOCKS = [block for page in PAGES for block in blocks(page)]


@pytest.fixture(scope="module")
def full_size_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_full_size_folders(tmp_path_factory.mktemp("full_size"))


# The tutorial is followed to the letter by tests/test_docs_site.py, which is more than what is done here.
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.stem != "tutorial"], ids=lambda page: page.relative_to(CHECKOUT).as_posix()
)
def test_every_block_of_a_page_works_in_the_order_it_stands_in(
    page: Path, full_size_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    reader = Reader(full_size_folders)
    for block in blocks(page):
        try:
            reader.do(block)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{block}: {type(error).__name__}: {error}") from error
    for name in set(sys.modules) - before:  # what the page has written is not there on the next
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def test_every_block_is_of_a_language_that_is_executed_or_stated_to_be_shown_only() -> None:
    assert [str(block) for block in ALL_BLOCKS if block.language not in EXECUTED + SHOWN_ONLY] == []
    for page in PAGES:
        fences = [line for line in page.read_text(encoding="utf-8").splitlines() if line.lstrip().startswith("```")]
        assert len(fences) == 2 * len(list(blocks(page))), f"{page.name} has a fence that no test reads"


def test_the_readme_sets_up_a_fresh_machine_in_two_commands_of_one_line_each() -> None:
    lines = [line for block in blocks(README) if block.language == "bash" for line in commands(block)]
    runs, tests, *others = lines
    assert SETUP.sub("", runs).startswith(".venv/bin/lora-forge run ")
    assert "--model tiny_sdxl" in runs
    assert SETUP.sub("", tests) == ".venv/bin/pytest -n 2"
    assert not any("venv" in line for line in others)
    assert ACCEPTANCE in others


@pytest.mark.slow
def test_the_readmes_first_command_works_in_a_clean_checkout_as_it_stands(tmp_path: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=CHECKOUT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        if (CHECKOUT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(CHECKOUT / name, tmp_path / name)
    command = commands(next(block for block in blocks(README) if block.language == "bash"))[0]
    # What is installed here already is not downloaded again; the package itself is built and installed anew.
    site_packages = next(path for path in sys.path if path.endswith("site-packages"))
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}
    environment = {**os.environ, **offline, "PYTHONPATH": site_packages}
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "output" / "tiny_owl_lora.safetensors").is_file()
    where = [".venv/bin/python", "-c", "import lora_forge.config.model as m; print(m.__file__, m.shipped_folder())"]
    outside = tmp_path / "output"
    shown = subprocess.run(
        [str(tmp_path / where[0]), *where[1:]], cwd=outside, env=environment, capture_output=True, text=True, check=True
    )
    assert all(part.startswith(str(tmp_path / ".venv")) for part in shown.stdout.split())


def test_what_contributing_asks_for_is_what_continuous_integration_runs() -> None:
    ci = (CHECKOUT / ".ci" / "run").read_text(encoding="utf-8").replace(' -d "$work/site"', "").splitlines()
    asked = [line for block in blocks(CHECKOUT / "CONTRIBUTING.md") for line in commands(block)]
    assert [line for line in asked if "venv" not in line and line not in ci] == []


def test_the_readmes_loss_is_a_complete_file_of_at_most_twelve_lines() -> None:
    (loss,) = [block for block in blocks(README) if block.file_name and block.language == "python"]
    assert len(loss.text.splitlines()) <= 12


@pytest.mark.parametrize("name", [*(hook for hook, _ in EXTENSION_POINTS.values()), *LIFECYCLE_EVENTS])
def test_each_hook_is_documented_with_its_exact_signature(name: str) -> None:
    page = {hook: PAGE_OF_KIND[kind] for kind, (hook, _) in EXTENSION_POINTS.items()}.get(name, EVENTS)
    signature = str(inspect.signature(getattr(hookspecs, name))).replace("'", "")
    assert f"`{name}{signature}`" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", EXTENSION_POINTS)
def test_the_example_in_an_extension_points_docstring_is_the_one_on_its_page(kind: str) -> None:
    docstring = inspect.getdoc(getattr(hookspecs, EXTENSION_POINTS[kind][0])) or ""
    example = docstring.partition("```python\n")[2].partition("```")[0]
    assert example
    files = [block.text.partition("\n")[2] for block in blocks(PAGE_OF_KIND[kind]) if block.file_name]
    assert without_double_blanks(example) in [without_double_blanks(text) for text in files]


@pytest.mark.parametrize("kind", EXTENSION_POINTS)
def test_every_field_of_a_spec_is_on_the_page_of_its_kind_or_among_the_common_ones(kind: str) -> None:
    own = {field.name for field in dataclasses.fields(EXTENSION_POINTS[kind][1])}
    common = {field.name for field in dataclasses.fields(Spec)}
    assert missing(common, PLUGINS) == []
    assert missing(own - common, PAGE_OF_KIND[kind]) == []


@pytest.mark.parametrize(
    ("record", "page"),
    [
        (contracts.InitialLayer, PAGE_OF_KIND["initializer"]),
        (contracts.SaveRequest, PAGE_OF_KIND["saver"]),
        (contracts.SaveReport, PAGE_OF_KIND["saver"]),
        (contracts.BackendRequest, PAGE_OF_KIND["backend"]),
        (contracts.EncoderOutput, PAGE_OF_KIND["loss"]),
        (contracts.ExecutorRequest, PAGE_OF_KIND["executor"]),
        *((record, EVENTS) for record in (RunInfo, RunStart, StepFinish, RunFinish, RunFailure)),
    ],
)
def test_every_field_of_what_a_plugin_is_given_is_on_its_page(record: Any, page: Path) -> None:
    assert missing((field.name for field in dataclasses.fields(record)), page) == []


def test_everything_a_loss_can_ask_its_batch_for_is_on_the_page_of_losses() -> None:
    from lora_forge.batch import Batch

    members = [name for name in vars(Batch) if not name.startswith("_")]
    assert len(members) > 8
    text = PAGE_OF_KIND["loss"].read_text(encoding="utf-8")
    assert [name for name in members if f"batch.{name}" not in text] == []


def test_every_rule_of_the_conformance_kit_is_on_the_page_about_testing_in_its_own_words() -> None:
    from lora_forge.testing import RULES

    text = (DOCS / "extend" / "testing.md").read_text(encoding="utf-8")
    every, *kinds = text.partition("## What is checked")[2].split("\n### ")
    sections = {PAGE_OF_KIND[kind]: rules for kind, rules in RULES.items()}
    assert sorted(one.partition("\n")[0].lower() for one in kinds) == sorted(page.stem for page in sections)
    for section in kinds:
        rules = sections[DOCS / "extend" / f"{section.partition(chr(10))[0].lower()}.md"]
        shown = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", every + section, re.MULTILINE))
        assert shown == rules, section.partition("\n")[0]


def test_every_method_of_a_backend_and_every_field_of_a_family_is_on_the_page_about_writing_one() -> None:
    from lora_forge.clip_unet.family import Family

    methods = [name for name in vars(contracts.Backend) if not name.startswith("_") and name != "target_groups"]
    assert len(methods) > 11
    assert missing([*methods, *(field.name for field in dataclasses.fields(Family))], WRITING_A_BACKEND) == []


def test_what_the_built_in_families_are_conditioned_on_is_on_the_usage_page() -> None:
    for spec in lora_forge_backends():
        assert spec.conditioning
        assert missing(spec.conditioning, USAGE) == []


def test_the_files_page_has_each_familys_metadata_and_names_in_a_column_of_its_own() -> None:
    text = (DOCS / "files.md").read_text(encoding="utf-8")
    sdxl, sd15 = (spec.layout for spec in lora_forge_backends())
    assert sdxl is not None
    assert sd15 is not None
    shown = {key: (a, b) for key, a, b in re.findall(r"^\| `([\w.]+)` \| `(.+?)` \| `(.+?)` \|$", text, re.MULTILINE)}
    assert shown == {key: (value, sd15.metadata[key]) for key, value in sdxl.metadata.items()}
    for component, layer, (ours, theirs) in [
        ("unet", "down_blocks.1.attentions.0.proj_in", ("lora_unet_input_blocks_4_1_", "")),
        ("unet", "down_blocks.0.attentions.0.proj_in", ("", "lora_unet_down_blocks_0_attentions_0_")),
        ("text_encoder", "text_model.encoder", ("lora_te1_text_model_", "lora_te_text_model_")),
    ]:
        for layout, name in ((sdxl, ours), (sd15, theirs)):
            assert universal_name(layout, component, layer).startswith(name)
            assert f"`{name}…`" in text or not name


def test_every_model_config_that_ships_is_on_the_models_page_with_its_base_model_and_counts() -> None:
    text = (DOCS / "models.md").read_text(encoding="utf-8")
    for name in shipped_names():
        config = read_model_config(name)
        (row,) = re.findall(rf"^\| `{name}` \| .+$", text, re.MULTILINE)
        assert row.endswith(f": {' + '.join(str(len(layers)) for layers in config.targets.values())} |")
        assert config.base_model == name or f"`{config.base_model}`" in row


def test_every_field_of_a_file_layout_is_on_the_page_of_backends() -> None:
    assert missing((field.name for field in dataclasses.fields(lora_forge.FileLayout)), PAGE_OF_KIND["backend"]) == []


def test_every_environment_variable_that_is_read_is_on_the_usage_page() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (CHECKOUT / "lora_forge").rglob("*.py"))
    read = {*re.findall(r"\bLORA_FORGE_[A-Z_]+\b", sources), *re.findall(r"environ\S*[(\[]\"([A-Z_]+)\"", sources)}
    assert read >= {"LORA_FORGE_PLUGINS", "LORA_FORGE_TRACE", "LORA_FORGE_CACHE", "SOURCE_DATE_EPOCH"}
    assert missing(read, USAGE) == []


def test_every_option_of_run_is_on_the_usage_page() -> None:
    from lora_forge.cli.run import command

    text = USAGE.read_text(encoding="utf-8")
    spellings = [name for parameter in command.params for name in parameter.opts]
    assert len(spellings) > 20
    assert [name for name in spellings if f"`{name}`" not in text] == []


def test_every_option_of_models_new_is_on_the_models_page() -> None:
    from lora_forge.cli.models import new_model

    text = (DOCS / "models.md").read_text(encoding="utf-8")
    options = [name for parameter in new_model.params for name in parameter.opts if name.startswith("-")]
    assert [name for name in options if f"`{name}`" not in text] == []


@pytest.mark.parametrize("verb", ["convert", "merge"])
def test_every_option_of_convert_and_merge_is_on_their_page(verb: str) -> None:
    command = importlib.import_module(f"lora_forge.cli.{verb}").command
    text = (DOCS / "convert.md").read_text(encoding="utf-8").split("## Merging")[verb == "merge"]
    options = [name for parameter in command.params for name in parameter.opts if name.startswith("-")]
    assert len(options) > 3
    assert [name for name in options if f"`{name}`" not in text] == []


@pytest.mark.parametrize("verb", ["list", "show", "check", "new"])
def test_every_option_of_the_verbs_about_plugins_is_on_a_page_about_plugins(verb: str) -> None:
    command = importlib.import_module(f"lora_forge.cli.plugins.{verb}").command
    pages = (PLUGINS, DOCS / "broken-plugins.md", DOCS / "extend" / "testing.md")
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    options = [name for parameter in command.params for name in parameter.opts if name.startswith("-")]
    assert options
    assert [name for name in options if not re.search(rf"`?{name}\b", text)] == []


def test_the_run_config_example_has_every_key_there_is() -> None:
    from lora_forge.config.run import RunConfig

    (example,) = [block for block in blocks(USAGE) if block.language == "toml"]
    keys = set(tomllib.loads(example.text))
    # Of strength and target_shift only one may be given; the other stands in a comment.
    assert {field.name for field in dataclasses.fields(RunConfig)} - keys == {"strength"}
    assert "strength = " in example.text


def test_the_tables_shown_on_the_usage_page_have_the_rows_and_columns_of_a_real_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_forge.cli.main import main

    monkeypatch.setenv("COLUMNS", "200")
    output = str(tmp_path / "owl.safetensors")
    assert main(["run", "--prompt", "a steampunk owl", "--model", "tiny_sdxl", "-o", output, "--iterations", "2"]) == 0
    real = " ".join(re.sub(r"[^\w‖Δ/–.]+", " ", capsys.readouterr().out).split())
    shown = next(block for block in blocks(USAGE) if block.language == "text")
    phrases = [phrase for line in shown.text.splitlines() for phrase in re.split(r"\s{2,}", line)]
    labels = [phrase for phrase in phrases if phrase and not re.match(r"[-\d]", phrase) and "self_attn" not in phrase]
    assert len(labels) > 15
    assert [label for label in labels if label not in real] == []


def test_the_lines_a_run_ends_with_make_an_image(model: str, tmp_path: Path) -> None:
    result = lora_forge.run("an owl", model, iterations=1, output=tmp_path / "owl.safetensors")
    names: dict[str, Any] = {}
    exec(
        result.usage.replace(".images[0]", ".images[0].size").replace(
            "pipe('an owl')", "pipe('an owl', num_inference_steps=1)"
        ),
        names,
    )
    assert names["image"] == (64, 64)


def without_double_blanks(code: str) -> str:
    return re.sub(r"\n{3,}", "\n\n", code)


def missing(names: Iterable[str], page: Path) -> list[str]:
    """Those of the names that the page has nowhere between backticks."""
    code = " ".join(re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")))
    return [name for name in sorted(names) if not re.search(rf"\b{name}\b", code)]
