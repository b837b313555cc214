"""`lora-forge run`: what it prints, what it writes, and that a file holds nothing but its run."""

from __future__ import annotations

import getpass
import json
import platform
import re
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import target_layers

import lora_forge
from lora_forge.cli.main import main
from lora_forge.clip_unet.backend import ClipUnetBackend
from lora_forge.clip_unet.family import Family
from lora_forge.config.model import shipped_folder

Cli = Callable[..., subprocess.CompletedProcess[str]]
TINY = ("run", "--prompt", "an owl", "--model", "tiny_sdxl", "--iterations", "2")
PLUGIN = """
from dataclasses import dataclass
from pathlib import Path
from lora_forge import LossSpec, hookimpl

print("a plugin prints")

@dataclass(frozen=True)
class Options:
    table: Path = Path("none.txt")

def quiet(batch, options):
    print("a loss prints")
    return sum(out.last_hidden_state.square().mean((1, 2)) for out in batch.adapted().values())

@hookimpl
def lora_forge_losses():
    yield LossSpec(name="quiet", summary="small embeddings", options=Options, factory=quiet)
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    return tmp_path


def metadata(path: Path | str) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    """The JSON of a run of two steps, on tiny_sdxl unless the arguments name another model."""
    capsys.readouterr()
    code = main([*TINY, *map(str, arguments), "--json"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    result: dict[str, Any] = json.loads(printed.out)
    return result


LONG = "an owl " * 50 + "and the end of it is cut"


@pytest.mark.parametrize(
    ("model", "option"), [("tiny_sdxl", "--prompt"), ("tiny_sdxl", "--prompt-2"), ("tiny_sd15", "--prompt")]
)
def test_what_a_prompt_has_beyond_75_tokens_is_quoted_in_a_warning(
    capsys: pytest.CaptureFixture[str], model: str, option: str
) -> None:
    assert main([*TINY, "--model", model, option, LONG, "-o", "owl.safetensors"]) == 0
    printed = capsys.readouterr()
    kept = "an owl " * 37 + "an"  # 75 tokens: each word is one
    (warning,) = [line for line in printed.err.splitlines() if "cut off" in line]
    assert warning.startswith("warning: ")
    assert repr(LONG.removeprefix(kept).strip()) in warning
    assert "cut off" not in printed.out


def test_a_prompt_of_75_tokens_is_cut_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    result = run_json(capsys, "--prompt", ("owl " * 75).strip(), "--iterations", "0")
    assert not [warning for warning in result["warnings"] if "cut off" in warning]
    result = run_json(capsys, "--prompt", ("owl " * 76).strip(), "--iterations", "0", "--overwrite")
    assert [warning for warning in result["warnings"] if warning.endswith("cut off: 'owl'")]


def test_json_is_one_object_alone_on_stdout_whatever_else_is_printed(cli: Cli, here: Path) -> None:
    (here / "quiet.py").write_text(PLUGIN, encoding="utf-8")
    done = cli(*TINY, "--plugin", "quiet.py", "--loss", "quiet", "--json", "--output", "owl.safetensors")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    result = json.loads(done.stdout)
    assert result["path"] == "owl.safetensors"
    assert len(result["steps"]) == result["iterations"] == 2
    assert result["before"] == result["steps"][0]
    assert set(result["after"]["terms"]) == {"quiet"}
    assert set(result["seconds"]) >= {"open", "load", "steps", "save"}
    for text in ("a plugin prints", "a loss prints", "step 2/2", "warning: inert"):
        assert text in done.stderr


def test_without_json_the_table_the_path_and_the_lines_that_use_the_file_are_on_stdout(
    capsys: pytest.CaptureFixture[str], family: Family, model: str, model_folder: Path
) -> None:
    assert main([*TINY, "--model", model, "-o", "owl.safetensors"]) == 0
    printed = capsys.readouterr()
    unet = str(len(target_layers(model)["unet"]))
    conditioning = {
        "sdxl": ("text_encoder penultimate", "text_encoder_2 penultimate", "text_encoder_2 pooled"),
        "sd15": ("text_encoder last",),
    }
    words = ("before", "after", "embedding_magnitude", "L2", "unet", unet, "‖ΔW‖", "relative shift", "cosine")
    for text in (*words, *family.encoders, "conditioning", *conditioning[family.name]):
        assert text in printed.out
    lines = printed.out.splitlines()
    assert "owl.safetensors" in lines
    start = lines.index("pipe.load_lora_weights('owl.safetensors')")
    assert f"diffusers.{family.pipeline}.from_pretrained({str(model_folder)!r}" in lines[start - 1]
    assert lines[start + 1].startswith("image = pipe('an owl'")
    assert "steps/s" in printed.err
    assert f"warning: inert: the objective cannot reach unet ({unet} of {unet} layers)" in printed.err


def test_a_dry_run_prints_the_resolved_run_reads_no_weights_and_writes_nothing(
    family: Family, model: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_weights(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(ClipUnetBackend, "load", no_weights)
    record = run_json(capsys, "--model", model, "--dry-run", "--seed", "3", "--loss", "embedding_magnitude:0.5")
    assert record["prompt"] == "an owl"
    assert (record["model"], record["seed"], record["iterations"]) == (model, 3, 2)
    assert record["layers"] == {component: len(layers) for component, layers in target_layers(model).items()}
    assert record["loaded"] == list(family.encoders)
    assert [(loss["name"], loss["weight"]) for loss in record["loss"]] == [("embedding_magnitude", 0.5)]
    assert record["output"] == "output/an_owl_lora.safetensors"

    assert main([*TINY, "--model", model, "--dry-run"]) == 0
    table = capsys.readouterr().out
    for text in ("an owl", model, "embedding_magnitude", "adamw", "gaussian", "output/an_owl_lora.safetensors"):
        assert text in table
    assert list(here.iterdir()) == []


def test_a_dry_run_and_its_run_name_the_same_file_and_resolve_to_the_same(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record = run_json(capsys, "--model", model, "--dry-run", "-o", "out/owl")
    result = run_json(capsys, "--model", model, "-o", "out/owl")
    assert record["output"] == result["path"] == "out/owl.safetensors"
    written = json.loads(metadata("out/owl.safetensors")["lora_forge"])["run"]
    assert [written.pop("saver")] == record["saver"]  # a file's record names the saver that wrote it, and no other
    assert written == {key: record[key] for key in written}


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a Steampunk OWL!", "a_steampunk_owl_lora.safetensors"),
        ("../../etc/passwd", "etc_passwd_lora.safetensors"),
        ("ふくろう", "prompt_c7be8afa_lora.safetensors"),
        ("word " * 40, ("word_" * 12).rstrip("_") + "_lora.safetensors"),
    ],
)
def test_without_an_output_the_file_is_named_after_the_prompt(
    here: Path, capsys: pytest.CaptureFixture[str], prompt: str, name: str
) -> None:
    result = run_json(capsys, "--prompt", prompt, "--iterations", "0")
    assert result["path"] == f"output/{name}"
    assert [str(path.relative_to(here)) for path in here.rglob("*.safetensors")] == [f"output/{name}"]


def test_the_same_seed_gives_the_same_bytes_in_every_process_and_in_the_seeds_own_spellings(
    cli: Cli, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spelled = ("run", "--prompt", "an owl", "--iterations", "2", "--model_name", "tiny_sdxl")
    process = cli(*spelled, "--output_path", "one/owl.safetensors", cwd=here)
    assert process.returncode == 0, process.stderr
    run_json(capsys, "-o", "two/owl.safetensors")
    run_json(capsys, "-o", "other/owl.safetensors", "--seed", "1")
    content = (here / "one/owl.safetensors").read_bytes()
    assert (here / "two/owl.safetensors").read_bytes() == content
    assert (here / "other/owl.safetensors").read_bytes() != content


def test_zero_iterations_write_the_initial_weights(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_json(capsys, "--model", model, "--iterations", "0", "--saver", "diffusers", "-o", "owl.safetensors")
    assert result["steps"] == []
    assert result["before"] == result["after"]
    tensors = load_file("owl.safetensors")
    initial = lora_forge.run("an owl", model, iterations=0).weights
    assert len(tensors) == 2 * sum(len(layers) for layers in initial.values())
    for component, layers in initial.items():
        for layer, pair in layers.items():
            assert tensors[f"{component}.{layer}.lora_A.weight"].equal(pair["lora_A"])
            assert not tensors[f"{component}.{layer}.lora_B.weight"].any()


@pytest.mark.parametrize(
    ("arguments", "epoch", "date"),
    [
        ((), None, None),
        (("--date", "2026-01-31"), None, "2026-01-31"),
        (("--date", "2026-01-31T12:00:00Z"), None, "2026-01-31T12:00:00Z"),
        ((), "86399", "1970-01-01"),
        ((), "86400", "1970-01-02"),
        (("--date", "2026-01-31"), "0", "2026-01-31"),
    ],
)
def test_a_file_holds_a_date_only_when_one_is_given(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    epoch: str | None,
    date: str | None,
) -> None:
    if epoch is not None:
        monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
    run_json(capsys, "--iterations", "0", "-o", "owl.safetensors", *arguments)
    assert metadata("owl.safetensors").get("modelspec.date") == date


@pytest.mark.parametrize("epoch", ["soon", "1e9", "9" * 30])
def test_a_source_date_epoch_that_is_no_time_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, here: Path, epoch: str
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
    assert main([*TINY]) == 2
    assert "SOURCE_DATE_EPOCH: expected seconds" in capsys.readouterr().err
    assert list(here.iterdir()) == []


def test_no_path_host_or_user_of_this_machine_is_in_the_file(
    model: str, model_folder: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private = here / "private place"
    private.mkdir()
    (private / "quiet.py").write_text(PLUGIN, encoding="utf-8")
    shutil.copy(shipped_folder() / f"{model}_config.json", private / "mine_config.json")
    first = run_json(capsys, "--model", model, "-o", private / "first.safetensors")
    assert first["path"] == str(private / "first.safetensors")
    base: list[str | Path] = ["--model", private / "mine_config.json", "--base-model", model_folder]
    plugin: list[str | Path] = [
        "--plugin",
        private / "quiet.py",
        "--loss",
        "quiet",
        "--loss-opt",
        f"table={private / 'table.txt'}",
    ]
    other: list[str | Path] = [
        "--init-from",
        private / "first.safetensors",
        "--backend-opt",
        f"config={private / 'configs'}",
    ]
    run_json(capsys, *base, *plugin, *other, "-o", private / "owl.safetensors")

    content = (private / "owl.safetensors").read_bytes()
    header = content[8 : 8 + int.from_bytes(content[:8], "little")].decode()
    paths = {str(here), here.name, private.name, str(model_folder.parent), str(Path.home())}
    for path in (*paths, str(Path(lora_forge.__file__).parents[1])):
        assert path not in header
        assert path.encode() not in content
    for name in (socket.gethostname(), platform.node(), getpass.getuser()):
        assert not re.search(rf"\b{re.escape(name)}\b", header)
    record = json.loads(metadata(private / "owl.safetensors")["lora_forge"])["run"]
    assert record["base_model"] == model_folder.name
    assert record["model"] == "mine"
    assert record["init_from"].startswith("first.safetensors sha256:")
    assert record["loss"][0]["options"] == {"table": "table.txt"}
    assert record["backend"]["options"]["config"] == "configs"
    assert record["loss"][0]["distribution"] == "quiet"


def test_the_file_says_who_made_it_from_what_and_with_which_versions(
    family: Family, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    second = ["--prompt-2", "a fox"] if len(family.encoders) > 1 else []
    result = run_json(capsys, "--model", model, *second, "--seed", "5", "-o", "owl.safetensors")
    record = json.loads(metadata("owl.safetensors")["lora_forge"])
    assert record["run"]["prompt"] == "an owl"
    assert record["run"]["prompt_2"] == ("a fox" if second else None)
    assert record["run"]["seed"] == 5
    assert len(record["run"]["model_config_sha256"]) == 64
    assert record["effect"] == result["effect"]
    assert record["versions"]["lora-forge"] == lora_forge.__version__
    assert set(record["versions"]) == {
        "lora-forge",
        "python",
        "torch",
        "transformers",
        "diffusers",
        "peft",
        "safetensors",
    }
    for kind in ("initializer", "optimizer", "saver", "backend"):
        supplier = record["run"][kind]
        assert (supplier["distribution"], supplier["version"]) == ("lora-forge", lora_forge.__version__)
        assert supplier["module"].startswith("lora_forge.builtin.")
    assert record["run"]["backend"]["name"] == family.name
    assert "seconds" not in json.dumps(record)
