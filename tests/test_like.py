"""`run --like FILE` repeats the run that made a file, says what differs, and executes no plugin that is only named."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from distributions import LOSS, Site, pretend_site, write_plugin
from refusals import refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_forge.cli.main import main
from lora_forge.config.model import shipped_folder
from lora_forge.files.header import read_metadata

Capture = pytest.CaptureFixture[str]
TINY = ("run", "--prompt", "an owl", "--model", "tiny_sdxl", "--iterations", "2")
MINE = """
from dataclasses import dataclass
from lora_forge import LossSpec, hookimpl

open("executed", "a").close()

@dataclass(frozen=True)
class Options:
    power: int = 2

def quiet(batch, options):
    return sum(out.last_hidden_state.abs().pow(options.power).mean((1, 2)) for out in batch.adapted().values())

@hookimpl
def lora_forge_losses():
    yield LossSpec(name="quiet", summary="small embeddings", options=Options, factory=quiet)
"""
CONFIG = """
prompt = "a fox"
model = "tiny_sdxl"
iterations = 3
strength = 1.5
plugins = ["mine.py"]
[[loss]]
name = "quiet"
weight = 0.5
options = {power = 3}
[[loss]]
name = "mine:quiet"
weight = -2
[optimizer]
name = "adamw"
options = {betas = [0.8, 0.99], schedule = "linear"}
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A site that is the current folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("LORA_FORGE_PLUGINS", "SOURCE_DATE_EPOCH"):
        monkeypatch.delenv(name, raising=False)
    with pretend_site(tmp_path, monkeypatch) as pretended:
        yield pretended


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a plain run."""
    path = tmp_path_factory.mktemp("made") / "owl.safetensors"
    with contextlib.redirect_stdout(io.StringIO()):
        assert main([*TINY, "-o", str(path)]) == 0
    return path


@pytest.fixture
def owl(site: Site, made: Path) -> Path:
    shutil.copy(made, "owl.safetensors")
    return Path("owl.safetensors")


def forge(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Rewrite a file with another record of its run."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    record = json.loads(metadata["lora_forge"])
    change(record)
    save_file(load_file(path), path, metadata={**metadata, "lora_forge": json.dumps(record)})
    return path


def notes(capsys: Capture) -> list[str]:
    """What the command line itself says on stderr, beside a run's progress and its warnings."""
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("lora-forge: ")]


# The same run again


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("--seed", "7", "--date", "2026-01-31", "--prompt-2", "a barn", "--strength", "2.5"),
        ("--rank", "2", "--alpha", "3.5", "--l2", "0.01", "--inert", "drop"),
        ("--optimizer-opt", "schedule=cosine", "--optimizer-opt", "warmup=1", "--initializer-opt", "std=0.02"),
        ("--saver", "diffusers", "--seed", "3", "--target-shift", "0.01"),
        ("--model", "tiny_sd15", "--seed", "3", "--strength", "2.5"),
        ("--model", "tiny_sd15", "--saver", "diffusers"),
    ],
    ids=" ".join,
)
def test_the_file_comes_out_the_same_to_the_byte(site: Site, capsys: Capture, settings: tuple[str, ...]) -> None:
    assert main([*TINY, *settings, "-o", "owl.safetensors"]) == 0
    capsys.readouterr()
    assert main(["run", "--like", "owl.safetensors", "-o", "again.safetensors"]) == 0
    assert notes(capsys) == []
    assert Path("again.safetensors").read_bytes() == Path("owl.safetensors").read_bytes()


@pytest.mark.parametrize("by_config", [False, True])
def test_a_run_with_a_plugin_file_comes_out_the_same_if_the_file_is_given_again(
    site: Site, capsys: Capture, by_config: bool
) -> None:
    write_plugin(Path("mine.py"), MINE)
    Path("run.toml").write_text(CONFIG)
    losses = ["--loss", "embedding_magnitude:2", "--loss", "quiet:0.5", "--loss-opt", "quiet.power=3"]
    first = ["run", "--config", "run.toml"] if by_config else [*TINY, "--plugin", "mine.py", *losses]
    assert main([*first, "-o", "owl.safetensors"]) == 0
    Path("elsewhere").mkdir()
    shutil.move("mine.py", "elsewhere/mine.py")
    capsys.readouterr()
    again = ["run", "--like", "owl.safetensors", "--plugin", "elsewhere/mine.py", "-o", "again.safetensors"]
    assert main(again) == 0
    assert notes(capsys) == []
    assert Path("again.safetensors").read_bytes() == Path("owl.safetensors").read_bytes()


def test_a_run_with_an_installed_plugin_comes_out_the_same(site: Site, capsys: Capture) -> None:
    site.install("good-losses", LOSS.format(name="small"))
    assert main([*TINY, "--loss", "small", "-o", "owl.safetensors"]) == 0
    site.install("bad-losses", LOSS.format(name="small"))  # a bare name would be of two now
    capsys.readouterr()
    assert main(["run", "--like", "owl.safetensors", "-o", "again.safetensors"]) == 0
    assert notes(capsys) == []
    assert Path("again.safetensors").read_bytes() == Path("owl.safetensors").read_bytes()


# What differs


@pytest.mark.parametrize(
    ("settings", "differences"),
    [
        (("--rank", "2"), ["rank was 4, now 2"]),
        (("--prompt", "a fox", "--seed", "5"), ["prompt was an owl, now a fox", "seed was 0, now 5"]),
        (("--strength", "2"), ["strength was absent, now 2.0"]),
        (("--optimizer-opt", "lr=0.5"), ["optimizer.options.lr was 0.0001, now 0.5"]),
        (("--loss", "embedding_magnitude:2"), ["loss.weight was 1.0, now 2.0"]),
        (("--saver", "diffusers"), ["saver.name was safetensors, now diffusers"]),
        (("--rank", "4"), []),
    ],
    ids=str,
)
def test_the_command_line_wins_and_each_difference_is_a_line(
    owl: Path, capsys: Capture, settings: tuple[str, ...], differences: list[str]
) -> None:
    assert main(["run", "--like", "owl.safetensors", *settings, "--dry-run", "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [f"lora-forge: not as owl.safetensors: {one}" for one in differences]
    record = json.loads(printed.out)
    if "--rank" in settings:
        assert record["rank"] == int(settings[1])
    assert record["iterations"] == 2


def test_the_same_run_on_another_family_names_the_model_and_what_comes_with_it(owl: Path, capsys: Capture) -> None:
    assert main(["run", "--like", "owl.safetensors", "--model", "tiny_sd15", "--dry-run", "--json"]) == 0
    printed = capsys.readouterr()
    lines = [line.removeprefix("lora-forge: not as owl.safetensors: ") for line in printed.err.splitlines()]
    assert lines[:3] == [
        "backend.name was sdxl, now sd15",
        "base_model was tiny_sdxl, now tiny_sd15",
        "model was tiny_sdxl, now tiny_sd15",
    ]
    assert [line.partition(" was ")[0] for line in lines[3:]] == ["model_config_sha256"]
    record = json.loads(printed.out)
    assert (record["backend"]["name"], record["layers"].keys()) == ("sd15", {"text_encoder", "unet"})


def test_a_run_config_wins_over_the_file_and_the_command_line_over_both(owl: Path, capsys: Capture) -> None:
    Path("run.toml").write_text("rank = 2\nseed = 3\n[optimizer.options]\nlr = 0.5\n")
    command = ["run", "--like", "owl.safetensors", "--config", "run.toml", "--seed", "4", "--dry-run", "--json"]
    assert main(command) == 0
    printed = capsys.readouterr()
    record = json.loads(printed.out)
    assert (record["prompt"], record["rank"], record["seed"]) == ("an owl", 2, 4)
    assert record["optimizer"]["options"]["lr"] == 0.5
    assert printed.err.splitlines() == [
        f"lora-forge: not as owl.safetensors: {one}"
        for one in ("optimizer.options.lr was 0.0001, now 0.5", "rank was 4, now 2", "seed was 0, now 4")
    ]


def _set(*path: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(record: Any) -> None:
        for key in path[:-1]:
            record = record[key]
        record[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set("run", "loss", 0, "version", to="0.0.9"), "loss.version was 0.0.9, now "),
        (_set("run", "optimizer", "version", to="0.0.9"), "optimizer.version was 0.0.9, now "),
        (_set("versions", "torch", to="1.2.3"), "torch was 1.2.3, now "),
        (_set("versions", "python", to="2.7"), "python was 2.7, now 3."),
        (_set("run", "model_config_sha256", to="ffff"), "model_config_sha256 was ffff, now "),
        (_set("versions", "abacus", to="7"), "abacus was 7, now absent"),
        (_set("run", "prompt_3", to="x\x1b[31m\ny"), r"prompt_3 was 'x\x1b[31m\ny', now absent"),
    ],
)
def test_another_version_than_recorded_is_one_line(
    owl: Path, capsys: Capture, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    assert main(["run", "--like", str(forge(owl, change)), "--dry-run"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"lora-forge: not as owl.safetensors: {words}")


def test_another_content_of_a_plugin_file_is_one_line(site: Site, capsys: Capture) -> None:
    mine = write_plugin(Path("mine.py"), MINE)
    assert main([*TINY, "--plugin", "mine.py", "--loss", "quiet", "-o", "owl.safetensors"]) == 0
    mine.write_text(mine.read_text() + "\n# edited\n")
    capsys.readouterr()
    assert main(["run", "--like", "owl.safetensors", "--plugin", "mine.py", "--dry-run"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lora-forge: not as owl.safetensors: loss.version was sha256:")
    assert ", now sha256:" in line


# What is missing


def test_an_installed_plugin_that_is_missing_is_named_with_distribution_and_version(
    site: Site, capsys: Capture
) -> None:
    site.install("good-losses", LOSS.format(name="small"), version="2.3")
    assert main([*TINY, "--loss", "small", "-o", "owl.safetensors"]) == 0
    shutil.rmtree("good_losses-2.3.dist-info")
    error = refused(capsys, "run", "--like", "owl.safetensors", "-o", "again.safetensors")
    assert error == (
        "like owl.safetensors: loss: 'small' is missing; it came from good-losses 2.3, which is not installed here\n"
    )
    assert not Path("again.safetensors").exists()
    assert main(["run", "--like", "owl.safetensors", "--loss", "embedding_magnitude", "--dry-run"]) == 0


def test_a_missing_plugin_that_is_installed_but_broken_is_named_with_the_cause(site: Site, capsys: Capture) -> None:
    module = site.install("good-losses", LOSS.format(name="small"))
    assert main([*TINY, "--loss", "small", "-o", "owl.safetensors"]) == 0
    del sys.modules[module]
    (site.folder / f"{module}.py").write_text("raise ValueError('no way') # and more")
    capsys.readouterr()
    assert main(["run", "--like", "owl.safetensors", "--dry-run"]) == 2
    error = capsys.readouterr().err.partition("lora-forge: error: ")[2]
    assert "loss: 'small' is missing; it came from good-losses 1.0" in error
    assert "good-losses:plugin, which is broken: ValueError: no way" in error


def test_a_plugin_file_that_is_not_given_again_is_an_error_and_is_never_executed(site: Site, capsys: Capture) -> None:
    write_plugin(Path("mine.py"), MINE)
    assert main([*TINY, "--plugin", "mine.py", "--loss", "quiet", "-o", "owl.safetensors"]) == 0
    mark = Path("executed")
    assert mark.exists(), "the mark below would not show an execution"
    mark.unlink()
    error = refused(capsys, "run", "--like", "owl.safetensors", "-o", "again.safetensors")
    assert error.startswith("like owl.safetensors: loss: 'quiet' is missing; it came from the plugin file 'mine.py'")
    assert "(sha256:" in error
    assert "give it again with --plugin" in error
    assert not mark.exists()
    assert not Path("again.safetensors").exists()
    forge(Path("owl.safetensors"), lambda record: record["run"].update(plugins=["mine.py"]))
    refused(capsys, "run", "--like", "owl.safetensors", "-o", "again.safetensors")
    assert not mark.exists()


def test_an_earlier_file_it_started_from_has_to_be_given_again(owl: Path, capsys: Capture) -> None:
    assert main([*TINY, "--init-from", "owl.safetensors", "-o", "second.safetensors"]) == 0
    error = refused(capsys, "run", "--like", "second.safetensors", "-o", "again.safetensors")
    assert "init_from: it started from owl.safetensors sha256:" in error
    assert "give it with --init-from" in error
    again = ["run", "--like", "second.safetensors", "--init-from", "owl.safetensors", "-o", "again.safetensors"]
    assert main(again) == 0
    assert Path("again.safetensors").read_bytes() == Path("second.safetensors").read_bytes()


@pytest.mark.parametrize("key", ["name", "distribution", "version", "module"])
def test_what_a_missing_plugin_is_called_by_a_stranger_cannot_steer_the_terminal(
    owl: Path, capsys: Capture, key: str
) -> None:
    text = ("sha256:" if key == "version" else "") + "x\x1b[31m\ny"
    forge(owl, _set("run", "loss", 0, "distribution", to="nobodys"))
    error = refused(capsys, "run", "--like", str(forge(owl, _set("run", "loss", 0, key, to=text))), "--dry-run")
    assert error.removesuffix("\n").isprintable(), error
    assert "is missing; it came from" in error


def test_another_model_comes_with_its_own_base_model_and_the_device_is_that_of_the_earlier_run(
    owl: Path, site: Site, capsys: Capture
) -> None:
    record = json.loads(read_metadata(owl)["lora_forge"])
    assert (record["device"], record["run"]["base_model"]) == ("cpu", "tiny_sdxl")
    config = json.loads((shipped_folder() / "tiny_sdxl_config.json").read_text(encoding="utf-8"))
    (site.folder / "mine.json").write_text(json.dumps(config | {"base_model": "nowhere"}), encoding="utf-8")
    assert main(["run", "--like", str(owl), "--model", "mine.json", "--dry-run"]) == 2
    assert "base model 'nowhere' does not exist" in capsys.readouterr().err
    assert main(["run", "--like", str(owl), "--device", "auto", "--dry-run"]) == 0
    assert "device was cpu, now auto" in capsys.readouterr().err


def test_an_option_that_is_a_path_has_to_be_given_again(site: Site, capsys: Capture) -> None:
    source = MINE.replace("power: int = 2", "words: list[Path] = field(default_factory=list)")
    source = source.replace("import dataclass\n", "import dataclass, field\nfrom pathlib import Path\n")
    write_plugin(site.folder / "mine.py", source.replace("options.power", "2"))
    words = site.folder / "secret" / "words.txt"
    given = ["--plugin", "mine.py", "--loss", "quiet", "--loss-opt", f"words={words}"]
    assert main([*TINY, *given, "-o", "a.safetensors"]) == 0
    assert str(site.folder) not in json.dumps(read_metadata(Path("a.safetensors")))
    capsys.readouterr()
    assert main(["run", "--like", "a.safetensors", "--plugin", "mine.py", "-o", "b.safetensors"]) == 2
    assert "quiet.words: ['words.txt'] is a path, of which a file keeps only the last part" in capsys.readouterr().err
    again = ["run", "--like", "a.safetensors", *given, "-o", "b.safetensors"]
    assert main(again) == 0
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()
