"""What the environment and `--strict-plugins` decide about installed plugins, and what can be seen of their cost."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from distributions import LOSS, Site, pretend_site, write_plugin

import lora_forge
from lora_forge.cli import registry as cli_registry
from lora_forge.cli.main import main
from lora_forge.errors import PluginError, UsageError
from lora_forge.plugins import BUILTIN, BUILTIN_MODULES, discover

Cli = Callable[..., subprocess.CompletedProcess[str]]
Capture = pytest.CaptureFixture[str]
OBSERVER = """
from lora_forge import hookimpl

@hookimpl
def lora_forge_run_started(event):
    pass

@hookimpl
def lora_forge_step_finished(event):
    print("a step")
"""
DRY_RUN = ("run", "--prompt", "an owl", "--model", "tiny_sdxl", "--dry-run")
BROKEN = "raise ValueError('no way')"
BUILTIN_IDS = [f"{BUILTIN}:{name}" for name in BUILTIN_MODULES]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.chdir(tmp_path)
    for name in ("LORA_FORGE_PLUGINS", "LORA_FORGE_TRACE"):
        monkeypatch.delenv(name, raising=False)
    with pretend_site(tmp_path, monkeypatch) as pretended:
        yield pretended


@pytest.fixture
def three(site: Site) -> Site:
    """Three distributions; that of `good-losses` has two entry points."""
    for name in ("alpha", "beta"):
        site.install(name, LOSS.format(name=name))
    module = site.install("good-losses", LOSS.format(name="good"), entry="one")
    (site.folder / "more_module.py").write_text(LOSS.format(name="more"))
    entries = site.folder / "good_losses-1.0.dist-info" / "entry_points.txt"
    entries.write_text(f"[lora_forge]\none = {module}\ntwo = more_module\n")
    return site


def strangers() -> list[str]:
    return [plugin.id for plugin in discover().plugins if plugin.distribution != BUILTIN]


# LORA_FORGE_PLUGINS


@pytest.mark.parametrize(
    ("value", "loaded"),
    [
        (None, ["alpha:plugin", "beta:plugin", "good-losses:one", "good-losses:two"]),
        ("beta", ["beta:plugin"]),
        ("good-losses", ["good-losses:one", "good-losses:two"]),
        ("Good_Losses", ["good-losses:one", "good-losses:two"]),
        ("good-losses:two", ["good-losses:two"]),
        (" beta , alpha:plugin,", ["beta:plugin", "alpha:plugin"]),
        ("beta,beta:plugin,beta", ["beta:plugin"]),
        ("", []),
        (" , ", []),
    ],
)
def test_the_variable_says_which_installed_plugins_are_loaded_by_distribution_or_id(
    three: Site, monkeypatch: pytest.MonkeyPatch, value: str | None, loaded: list[str]
) -> None:
    if value is not None:
        monkeypatch.setenv("LORA_FORGE_PLUGINS", value)
    assert strangers() == loaded
    assert [plugin.id for plugin in discover().plugins if plugin.distribution == BUILTIN] == BUILTIN_IDS


def test_a_plugin_that_the_variable_leaves_out_is_not_even_imported(
    three: Site, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    mark = three.folder / "imported"
    module = three.install("unwanted", f"open({str(mark)!r}, 'w').close()\nraise ValueError('no way')")
    monkeypatch.setenv("LORA_FORGE_PLUGINS", "alpha")
    assert main(["plugins", "show", "alpha", "--strict-plugins"]) == 0
    assert main(list(DRY_RUN)) == 0
    assert "unwanted" not in capsys.readouterr().err
    assert not mark.exists()
    assert not {module, "beta_module", "good_losses_module"} & set(sys.modules)
    monkeypatch.delenv("LORA_FORGE_PLUGINS")
    assert main(["plugins", "show", "alpha"]) == 0
    assert mark.exists(), "the check above would not see an import"


@pytest.mark.parametrize("command", [("plugins", "list"), ("plugins", "show", "adamw"), DRY_RUN])
def test_a_name_in_the_variable_that_is_not_installed_is_an_error_with_the_nearest_one(
    three: Site, monkeypatch: pytest.MonkeyPatch, capsys: Capture, command: tuple[str, ...]
) -> None:
    monkeypatch.setenv("LORA_FORGE_PLUGINS", "alpha,good-loses")
    assert main(list(command)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    words = "LORA_FORGE_PLUGINS: no plugin 'good-loses' is installed; did you mean 'good-losses'?\n"
    assert printed.err.startswith("lora-forge: error: ")
    assert printed.err.endswith(words)
    assert len(printed.err.splitlines()) == 1


def test_a_plugin_file_is_loaded_whatever_the_variable_says(
    three: Site, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("LORA_FORGE_PLUGINS", "")
    mine = write_plugin(three.folder / "mine.py", LOSS.format(name="small"))
    assert main([*DRY_RUN, "--plugin", str(mine), "--loss", "small"]) == 0
    assert main([*DRY_RUN, "--plugin", str(mine), "--loss", "alpha"]) == 2
    assert "unknown loss 'alpha'" in capsys.readouterr().err


def test_the_variable_holds_for_the_python_api_too(three: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_FORGE_PLUGINS", "beta")
    with lora_forge.load("tiny_sdxl") as session, pytest.raises(UsageError, match="unknown loss 'alpha'"):
        session.run("an owl", loss="alpha", iterations=0)
    monkeypatch.setenv("LORA_FORGE_PLUGINS", "gamma")
    with pytest.raises(PluginError, match="LORA_FORGE_PLUGINS: no plugin 'gamma' is installed"):
        lora_forge.load("tiny_sdxl")


# --strict-plugins


@pytest.mark.parametrize(
    "command",
    [
        (*DRY_RUN, "--strict-plugins"),
        (*DRY_RUN, "--config", "strict.toml"),
        ("plugins", "list", "--strict-plugins"),
        ("plugins", "list", "--strict-plugins", "--json"),
        ("plugins", "show", "adamw", "--strict-plugins"),
    ],
    ids=" ".join,
)
def test_where_strict_every_broken_plugin_is_an_error_and_nothing_is_done(
    site: Site, capsys: Capture, command: tuple[str, ...]
) -> None:
    site.install("good", LOSS.format(name="small"))
    Path("strict.toml").write_text("strict_plugins = true\n")
    assert main(list(command)) == 0, "nothing is broken yet"
    site.install("bad", BROKEN)
    site.install("worse", "from lora_forge import hookimpl\n@hookimpl\ndef lora_forge_loses():\n    yield 1\n")
    capsys.readouterr()
    assert main(list(command)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "bad:plugin: ValueError: no way" in printed.err
    assert "worse:plugin: unknown hook 'lora_forge_loses'; did you mean 'lora_forge_losses'?" in printed.err
    assert "good:plugin" not in printed.err


def test_the_python_api_can_be_strict(site: Site) -> None:
    site.install("bad", BROKEN)
    lora_forge.load("tiny_sdxl").close()
    lora_forge.load("tiny_sdxl", strict_plugins=False).close()
    with pytest.raises(PluginError, match=r"bad:plugin: ValueError: no way"):
        lora_forge.load("tiny_sdxl", strict_plugins=True)
    with pytest.raises(PluginError, match=r"bad:plugin: ValueError: no way"):
        lora_forge.run("an owl", "tiny_sdxl", strict_plugins=True, iterations=0)


def test_a_broken_plugin_that_the_variable_leaves_out_does_not_count(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.install("bad", BROKEN)
    monkeypatch.setenv("LORA_FORGE_PLUGINS", "")
    assert main([*DRY_RUN, "--strict-plugins"]) == 0


# LORA_FORGE_TRACE

TRACE = re.compile(r"lora-forge: trace: (.+): \d+\.\d\d ms")


def traced(text: str) -> list[str]:
    """What the trace says was called, in order."""
    return [match[1] for line in text.splitlines() if (match := TRACE.fullmatch(line))]


@pytest.mark.parametrize("command", [("plugins", "list"), ("plugins", "list", "--json"), (*DRY_RUN, "--json")])
def test_a_trace_is_on_stderr_and_leaves_stdout_as_it_is(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Capture, command: tuple[str, ...]
) -> None:
    site.install("good", LOSS.format(name="small"))
    outputs, traces = [], []
    for value in (None, "", "0", "1"):
        if value is not None:
            monkeypatch.setenv("LORA_FORGE_TRACE", value)
        assert main(list(command)) == 0
        printed = capsys.readouterr()
        outputs.append(printed.out)
        traces.append(traced(printed.err))
    assert len(set(outputs)) == 1
    assert traces[:3] == [[], [], []]
    assert {f"import {one}" for one in (*BUILTIN_IDS, "good:plugin")} <= set(traces[3])
    assert traces[3][-2:] == ["import good:plugin", "lora_forge_losses of good:plugin"]


def test_each_hook_call_of_a_run_is_traced_that_of_a_failing_plugin_too(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    site.install("bad", BROKEN)
    site.install("watcher", OBSERVER)
    site.install(
        "clumsy", "from lora_forge import hookimpl\n@hookimpl\ndef lora_forge_run_finished(event):\n    1 / 0\n"
    )
    monkeypatch.setenv("LORA_FORGE_TRACE", "1")
    run = ["run", "--prompt", "an owl", "--model", "tiny_sdxl", "--iterations", "2", "-o", "owl.safetensors", "--json"]
    assert main(run) == 0
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)["steps"]) == 2
    lines = traced(printed.err)
    calls = [line for line in lines if line.startswith("lora_forge_") and BUILTIN not in line]
    assert [one for one in calls if "progress" not in one and "start_up" not in one] == [
        "lora_forge_run_started of watcher:plugin",
        *["lora_forge_step_finished of watcher:plugin"] * 2,
        "lora_forge_run_finished of clumsy:plugin",
    ]
    assert {"import bad:plugin", "import watcher:plugin", "import clumsy:plugin"} <= set(lines)


# What a plugin costs


def test_a_slow_plugin_is_a_line_on_stderr_with_its_seconds(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    site.install("slow", "import time\ntime.sleep(0.06)\n" + LOSS.format(name="small"))
    site.install("slow-bad", f"import time\ntime.sleep(0.06)\n{BROKEN}\n")
    broken = r"lora-forge: plugin slow-bad:plugin is broken and ignored: ValueError: no way"
    seen = {}
    for limit in (float("inf"), 0.05):
        sys.modules.pop("slow_module", None)
        monkeypatch.setattr(cli_registry, "SLOW_SECONDS", limit)
        assert main(["plugins", "show", "adamw"]) == 0
        seen[limit] = [line for line in capsys.readouterr().err.splitlines() if "plugin slow" in line]
    assert seen[float("inf")] == [broken]
    slow_and_broken, slow = seen[0.05]
    assert re.fullmatch(r"lora-forge: plugin slow:plugin took \d+\.\d s to import", slow)
    assert re.fullmatch(broken + r" \(it took \d+\.\d s to import\)", slow_and_broken)


def test_the_list_says_what_a_slow_plugin_took(site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    site.install("slow", "import time\ntime.sleep(0.06)\n")
    monkeypatch.setattr(cli_registry, "SLOW_SECONDS", 0.05)
    assert main(["plugins", "list", "--json"]) == 0
    slow = {one["plugin"]: one for one in json.loads(capsys.readouterr().out)["slow"]}
    assert slow["slow:plugin"]["seconds"] >= 0.06
    assert slow["slow:plugin"]["imports"] == []


def test_a_plugin_that_imports_torch_at_its_own_import_is_named_by_the_list_and_only_the_first(
    site: Site, cli: Cli
) -> None:
    site.install("heavy", "import torch\n" + LOSS.format(name="small"))
    site.install("later", "import torch\n")
    site.install("light", LOSS.format(name="other"))
    environment = {**os.environ, "PYTHONPATH": str(site.folder)}
    done = cli("plugins", "list", env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    slow = [line for line in done.stdout.splitlines() if line.startswith("slow: ")]
    assert len(slow) == 1, slow
    assert re.fullmatch(r"slow: heavy:plugin: took \d+\.\d s to import, since it imports torch", slow[0])


# Rows of the list that are no spec's


def test_observers_and_plugins_that_supply_nothing_are_rows_of_the_list(
    site: Site, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.install("watcher", OBSERVER, version="2.0")
    site.install("empty", "", entry="nothing")
    site.install("both", OBSERVER + LOSS.format(name="small"))
    assert main(["plugins", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert (listed["broken"], listed["slow"]) == ([], [])
    rows = {(row["kind"], row["name"]): row for row in listed["plugins"] if row["distribution"] != BUILTIN}
    observes = "observes run_started, step_finished"
    assert {key: (row["version"], row["summary"], row["status"]) for key, row in rows.items()} == {
        ("observer", "watcher:plugin"): ("2.0", observes, "ok"),
        ("observer", "both:plugin"): ("1.0", observes, "ok"),
        ("loss", "small"): ("1.0", "small embeddings", "ok"),
        ("", "empty:nothing"): ("1.0", "", "supplies nothing"),
    }
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["plugins", "list"]) == 0
    table = capsys.readouterr().out
    assert "watcher:plugin" in table
    assert "supplies nothing" in " ".join(table.split())
    assert main(["plugins", "list", "--kind", "loss", "--json"]) == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)["plugins"]]
    assert {"embedding_magnitude", "small"} <= set(names)
