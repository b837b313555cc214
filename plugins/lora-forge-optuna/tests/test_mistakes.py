"""What cannot be done as asked: one line, exit code 2, nothing written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from sweeps import PROMPTS, WITH_TOYS, sweep

RANK = ("--search", "rank=2|4")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--search", "rnk=2|4"), "rnk: unknown key; did you mean 'rank'?"),
        (("--search", "rank=two|4"), "expected an integer, got 'two'"),
        (("--search", "rank=2..4.0"), "rank: expected an integer, got 2.0"),
        (("--search", "rank=0..4"), "rank: must be ≥ 1, got 0"),
        (("--search", "optimizer.lrr=1e-4..1e-2"), "adamw.lrr: unknown option; did you mean 'lr'?"),
        (("--search", "optimiser.lr=1e-4..1e-2"), "did you mean 'optimizer'?"),
        (("--search", "initializer=gaussian|orthogonl"), "did you mean 'orthogonal'?"),
        (("--search", "loss=level|levels", *WITH_TOYS), "did you mean 'level'?"),
        (("--search", "loss.embeding_magnitude.layer=last|penultimate"), "did you mean 'embedding_magnitude'?"),
        (("--search", "loss.embedding_magnitude.layr=last|penultimate"), "did you mean 'layer'?"),
        (("--search", "weight.embeding_magnitude=0.1..1.0"), "did you mean 'embedding_magnitude'?"),
        (("--set", "l3=1", *RANK), "l3: unknown key; did you mean 'l2'?"),
        (("--search", "rank=4"), "rank: expected LOW..HIGH"),
        (("--search", "rank=4..2"), "rank: 4 is not below 2"),
        (("--search", "l2=0..1 log"), "l2: with log the low end is above zero"),
        (("--search", "rank"), "--search takes KEY=VALUE, got 'rank'"),
        (("--search", "l2=0..0.5", "--sampler", "grid"), "l2: a grid takes a step"),
        ((*RANK, "--search", "rank=2..8"), "rank: is searched twice"),
        ((*RANK, "--set", "rank=2"), "rank: is both set and searched"),
        (("--search", "seed=1..4"), "seed: it is the same in all trials"),
        (("--search", "device=cpu|cuda"), "device: it is the same in all trials"),
        ((*RANK, "--set", "output=owl"), "output: this is the sweep's own to say"),
        ((*RANK, "--model", "tiny_sdx"), "did you mean 'tiny_sdxl'?"),
        ((*RANK, "--storage", "nosuch://it"), "--storage: 'nosuch://it' cannot be used"),
        ((*RANK, "--config", "absent.toml"), "absent.toml: run config cannot be read: No such file"),
        ((*RANK, "--controls", "absent.txt"), "'absent.txt' cannot be read"),
        ((*RANK, "--sampler", "tpee"), "tpee"),
    ],
)
def test_a_mistake_is_named_with_the_nearest_known_word_and_nothing_is_written(
    arguments: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("lora-forge-sweep: error: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ("specifcity", "did you mean 'specificity'?"),
        ("measure", "did you mean 'measure:NAME'?"),
        ("measure:embed_preserv", "did you mean 'embed_preserve'?"),
    ],
)
def test_a_metric_that_is_not_known_is_named_with_the_nearest(
    metric: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(tmp_path / "out", *RANK, metric=metric) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_sweep_without_a_prompt_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(tmp_path / "out", *RANK, prompts=()) == 2
    assert sweep(tmp_path / "out", *RANK, prompts=(PROMPTS[0], " ")) == 2
    assert capsys.readouterr().err.count("there is no prompt") == 2


def test_help_and_mistakes_of_the_command_line_import_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "diffusers", "peft", "optuna", "sqlalchemy")
    script = (
        "import sys; from lora_forge_optuna.cli import main\n"
        "assert main(['--help']) == 0\n"
        "asked = ['--prompt', 'owl', '--metric', 'loss', '--output-dir', 'out']\n"
        "assert main([*asked, '--search', 'rank=4']) == 2\n"
        f"assert not [name for name in {heavy} if name in sys.modules]\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--search" in done.stdout
