"""The documentation as a whole: its links, its site, and the tutorial followed to the letter."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from distributions import LOSS, pretend_site
from docs_pages import CHECKOUT, DOCS, PAGES, PLUGIN_PAGES, blocks
from docs_shell import Shell
from fresh_environment import FreshEnvironment
from test_builtin_imports import PUBLIC

from lora_forge.cli.main import main
from lora_forge.scaffold import package_files

TUTORIAL = DOCS / "tutorial.md"
BACKEND = DOCS / "extend" / "writing-a-backend.md"
SD15 = CHECKOUT / "lora_forge" / "builtin" / "sd15"
EXAMPLE = CHECKOUT / "plugins" / "lora-forge-example-loss"
FOLLOWED = [page for page in PAGES[1:] if re.search(r"^(pip|pytest)\b", page.read_text(encoding="utf-8"), re.MULTILINE)]


def test_the_files_the_tutorial_shows_are_those_of_the_example_byte_for_byte() -> None:
    shown = {block.title: block.text for block in blocks(TUTORIAL) if block.title}
    assert {name: (EXAMPLE / name).read_bytes() for name in shown if name} == {
        name: text.encode() for name, text in shown.items()
    }
    files = {path.relative_to(EXAMPLE).as_posix() for path in EXAMPLE.rglob("*") if path.suffix in (".py", ".toml")}
    assert files == set(shown)


@pytest.mark.parametrize("page", [page for page in PAGES if any(block.of_the_project for block in blocks(page))])
def test_a_block_that_shows_a_file_of_the_project_is_that_files_own_lines_to_the_letter(page: Path) -> None:
    for block in blocks(page):
        if block.of_the_project and block.title:
            content = (CHECKOUT / block.title).read_text(encoding="utf-8")
            assert f"\n{block.text}" in f"\n{content}", str(block)


def test_the_page_on_writing_a_backend_shows_the_two_files_of_sd15_whole_and_all_its_configs() -> None:
    shown = {block.title: block.text for block in blocks(BACKEND) if block.title}
    for file in ("family.py", "backend.py"):
        assert shown[f"lora_forge/builtin/sd15/{file}"] == (SD15 / file).read_text(encoding="utf-8")
    assert {path.name for path in SD15.glob("*.py")} == {"__init__.py", "family.py", "backend.py"}
    (tree,) = [block for block in blocks(BACKEND) if block.language == "text"]
    configs = SD15 / "configs"
    files = {path.relative_to(configs).as_posix() for path in configs.rglob("*") if path.is_file()}
    assert {line.strip() for line in tree.text.splitlines()[1:]} == files


def test_the_files_shown_make_a_backend_in_a_distribution_of_somebody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def another(text: str) -> str:
        text = text.replace("lora_forge.builtin.sd15", "other_module").replace("tiny_sd15", "tiny_other")
        return text.replace('name="sd15"', 'name="other"')

    package = tmp_path / "other_module"
    shutil.copytree(SD15 / "configs", package / "configs")
    (package / "__init__.py").touch()
    for block in blocks(BACKEND):
        if block.title and "/sd15/" in block.title:
            (package / Path(block.title).name).write_text(another(block.text), encoding="utf-8")
    record = (SD15.parent / "backends.py").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_FORGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LORA_FORGE_PLUGINS", "somebodys")
    with pretend_site(tmp_path, monkeypatch) as site:
        site.install("somebodys", another(record))
        assert main(["plugins", "check", "other"]) == 0, capsys.readouterr().out
        assert main(["models", "new", "mine", "--base-model", "tiny_other"]) == 0
        run = ["run", "--prompt", "an owl", "--model", "mine_config.json", "--iterations", "1", "-o", "owl.safetensors"]
        assert main(run) == 0
        assert "text_encoder last" in capsys.readouterr().out


def test_what_the_tutorial_does_not_change_is_as_plugins_new_writes_it() -> None:
    written = package_files("lora-forge-example-loss", "loss")
    for name in ("pyproject.toml", "LICENSE"):
        assert (EXAMPLE / name).read_text(encoding="utf-8") == written[name]
    replaced = {block.title for block in blocks(TUTORIAL) if block.title}
    assert {name for name in written if name.endswith(".py")} <= replaced


@pytest.mark.slow
@pytest.mark.parametrize("page", FOLLOWED, ids=lambda page: page.stem)
def test_a_page_that_installs_or_tests_works_to_the_letter_in_a_fresh_environment(page: Path, tmp_path: Path) -> None:
    environment = FreshEnvironment.make(tmp_path / "environment")
    folder = tmp_path / "empty"
    folder.mkdir()
    shell = Shell(environment, folder)
    shell.follow(blocks(page))
    if page == TUTORIAL:
        (wheel,) = shell.folder.glob("dist/*.whl")
        assert f"`{wheel.name}`" in page.read_text(encoding="utf-8")
        another = FreshEnvironment.make(tmp_path / "another")
        another.install(wheel)
        assert "lora-forge-example-loss 0.1.0" in another.run("plugins", "show", "lean").stdout


def test_the_tutorial_sets_up_as_the_readme_does() -> None:
    (setup,) = [block for block in blocks(TUTORIAL) if block.sets_up]
    readme = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    python, activate, install = setup.text.splitlines()
    assert f"{python} && .venv/bin/{install} " in readme
    assert activate == ". .venv/bin/activate"


def test_what_the_page_about_broken_plugins_shows_is_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, conflict = [block.text for block in blocks(DOCS / "broken-plugins.md") if block.language == "text"]
    run = ["run", "--prompt", "an owl", "--model", "tiny_sdxl", "--dry-run"]
    with pretend_site(tmp_path, monkeypatch) as site:
        site.install("lora-forge-blue", "raise ImportError('no paint')")
        site.install("lora-forge-dusk", LOSS.format(name="night"))
        site.install("lora-forge-moon", LOSS.format(name="night"))
        monkeypatch.setenv("LORA_FORGE_PLUGINS", "lora-forge-blue,lora-forge-dusk,lora-forge-moon")
        assert main(run) == 0
        assert capsys.readouterr().err == broken
        assert main([*run, "--loss", "night"]) == 2
        assert capsys.readouterr().err.splitlines()[1:] == conflict.splitlines()
        assert main([*run, "--loss", "lora-forge-moon:night:0.5"]) == 0


def test_every_relative_link_leads_somewhere() -> None:
    broken = []
    for page in (*PAGES, *PLUGIN_PAGES, CHECKOUT / "CONTRIBUTING.md", CHECKOUT / "CHANGELOG.md"):
        for target in _links(page):
            path, _, anchor = target.partition("#")
            linked = page.parent / path if path else page
            if not linked.exists() or (anchor and anchor not in _anchors(linked)):
                broken.append(f"{page.relative_to(CHECKOUT)}: {target}")
    assert broken == []


def test_no_page_links_to_what_the_site_does_not_have() -> None:
    outside = [
        f"{page.relative_to(DOCS)}: {target}"
        for page in PAGES[1:]
        for target in _links(page)
        if not (page.parent / target.partition("#")[0]).resolve().is_relative_to(DOCS)
    ]
    assert outside == []


def test_every_page_is_in_the_index_and_in_the_navigation() -> None:
    names = [page.relative_to(DOCS).as_posix() for page in PAGES[1:]]
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    assert [name for name in names if name != "index.md" and f"({name})" not in index] == []
    navigation = (CHECKOUT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"[\w/-]+\.md\b", navigation)) == sorted(names)


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_needs_no_other_host(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) >= len(PAGES) - 1
    loaded = re.compile(r"<(?:script|img|iframe|source|link)\b[^>]*\b(?:src|href)=\"?(?:https?:)?//")
    assert [str(page) for page in pages if loaded.search(page.read_text(encoding="utf-8"))] == []
    assert (tmp_path / "search" / "search_index.json").is_file()


def test_every_file_path_the_architecture_page_names_exists() -> None:
    (tree,) = [block for block in blocks(DOCS / "architecture.md") if block.language == "text"]
    names = re.findall(r"\b(\w+(?:\.py|/))", tree.text)
    assert len(names) > 30
    package = CHECKOUT / "lora_forge"
    assert [name for name in names if not any(package.rglob(name.rstrip("/")))] == []


def test_every_module_of_the_package_is_named_on_the_architecture_page() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    modules = [path.name for path in (CHECKOUT / "lora_forge").glob("*.py") if not path.name.startswith("_")]
    assert [name for name in modules if name not in text and name != "errors.py"] == []


def test_every_module_that_plugins_may_import_can_be_imported_and_is_in_the_reference() -> None:
    section = (DOCS / "plugins.md").read_text(encoding="utf-8").partition("## What a plugin may import")[2]
    modules = re.findall(r"`(lora_forge[\w.]*)`", section.partition("\n## ")[0])
    assert {*modules} - {"lora_forge.events", "lora_forge.testing"} == PUBLIC  # two that no built-in has a use for
    reference = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    for module in modules:
        __import__(module)
        assert re.search(rf"^::: {module}\b", reference, re.MULTILINE), module


def _links(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
