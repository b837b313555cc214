"""What is searched, what is made of it, and what comes out best."""

from __future__ import annotations

import itertools
import json
import math
import shlex
import statistics
import tomllib
from pathlib import Path
from typing import Any

import pytest
from sweeps import PROMPTS, WITH_TOYS, complete, lines, sweep

import lora_forge
from lora_forge.cli.main import main as lora_forge_main

RANKS, RATES = (2, 4), (0.001, 0.01)
GRID = ("--search", "rank=2|4", "--search", "optimizer.lr=0.001|0.01", "--sampler", "grid")


def test_a_grid_finds_what_a_loop_over_all_settings_finds_to_the_bit(tmp_path: Path) -> None:
    controls = tmp_path / "controls.txt"
    controls.write_text("a bowl of cherries\nnorthern lights\n", encoding="utf-8")
    held_against = ("--controls", str(controls), "--seeds", "2")
    assert sweep(tmp_path, *GRID, *held_against, metric="specificity", prompts=PROMPTS) == 0
    naive = {}
    with lora_forge.load("tiny_sdxl", iterations=2, probe=True, controls=controls.read_text().splitlines()) as session:
        for rank, rate in itertools.product(RANKS, RATES):
            ratios = []
            for prompt, seed in itertools.product(PROMPTS, (0, 1)):
                result = session.run(prompt, seed=seed, rank=rank, optimizer={"options": {"lr": rate}})
                assert result.probe is not None
                ratios.append(result.probe.specificity.ratio)
            naive[rank, rate] = ratios
    found = {tuple(line["params"].values()): line for line in lines(tmp_path)}
    assert {key: [one["value"] for one in line["values"]] for key, line in found.items()} == naive
    best = max(naive, key=lambda key: statistics.fmean(naive[key]))
    assert max(complete(tmp_path), key=lambda line: line["value"])["params"] == dict(
        zip(("rank", "optimizer.lr"), best, strict=True)
    )
    written = tomllib.loads((tmp_path / "best.toml").read_text(encoding="utf-8"))
    assert (written["rank"], written["optimizer"]["options"]["lr"]) == best


@pytest.mark.parametrize(
    ("metric", "direction"),
    [("conditioning_shift", max), ("effective_rank", max), ("loss", min), ("measure:embed_preserve", min)],
)
def test_each_metric_is_what_a_run_says_and_goes_its_own_way(
    metric: str, direction: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--search", "optimizer.lr=0.001|0.02", "--sampler", "grid", "--json")
    assert sweep(tmp_path, *arguments, metric=metric) == 0
    settings = {"iterations": 2, "probe": True, "measure": "embed_preserve"}
    values = []
    for rate in (0.001, 0.02):
        result = lora_forge.run(PROMPTS[0], "tiny_sdxl", optimizer={"options": {"lr": rate}}, **settings)
        assert result.probe is not None
        values.append(
            {
                "conditioning_shift": result.probe.conditioning_shift,
                "effective_rank": result.probe.effective_rank,
                "loss": result.loss_after,
                "measure:embed_preserve": result.measured["embed_preserve"][1],
            }[metric]
        )
    assert sorted(line["value"] for line in lines(tmp_path)) == sorted(values)
    assert json.loads(capsys.readouterr().out)["best"]["value"] == direction(values)


def test_the_direction_can_be_turned(tmp_path: Path) -> None:
    assert sweep(tmp_path, *WITH_TOYS, "--loss", "level", *LEVELS, "--direction", "max") == 0
    assert "level = 3" in (tmp_path / "best.toml").read_text(encoding="utf-8")


LEVELS = ("--search", "loss.level.level=1|2|3", "--sampler", "grid")


def test_options_of_a_plugin_are_searched_in_the_trials_that_use_it_and_a_grid_has_no_point_twice(
    tmp_path: Path,
) -> None:
    arguments = ("--search", "loss.level.level=1|2", "--search", "loss=level|embedding_magnitude + level:0.5|counted")
    log = ("--set", f"loss.counted.log={tmp_path / 'log'}", "--search", "weight.level=1|3")
    assert sweep(tmp_path, *WITH_TOYS, *arguments, *log, "--sampler", "grid") == 0
    points = [tuple(line["params"].items()) for line in lines(tmp_path)]
    own = [(("loss.level.level", level), ("weight.level", weight)) for level in (1, 2) for weight in (1, 3)]
    expected = [(("loss", loss), *rest) for loss in ("level", "embedding_magnitude + level:0.5") for rest in own]
    assert sorted(points) == sorted([*expected, (("loss", "counted"),)])
    (both,) = [line for line in lines(tmp_path) if line["params"] == dict(expected[-1])]
    assert both["settings"]["loss"] == [
        {"name": "embedding_magnitude"},
        {"name": "level", "weight": 3, "options": {"level": 2}},
    ]


def test_numbers_stay_in_their_range_and_are_whole_where_all_that_was_typed_is_whole(tmp_path: Path) -> None:
    ranges = ("rank=2..6 step 2", "alpha=1..4", "l2=1e-6..1e-3 log", "optimizer.lr=0.001..0.01 step 0.003")
    searches = [word for one in ranges for word in ("--search", one)]
    assert sweep(tmp_path, *searches, "--set", "iterations=0", "--trials", "12", "--sampler", "random") == 0
    params = [line["params"] for line in complete(tmp_path)]
    assert len(params) == 12
    assert {one["rank"] for one in params} == {2, 4, 6}
    assert {one["alpha"] for one in params} == {1, 2, 3, 4}
    assert {type(one["alpha"]) for one in params} == {int}
    assert {round(one["optimizer.lr"], 12) for one in params} <= {0.001, 0.004, 0.007, 0.01}
    assert all(1e-6 <= one["l2"] <= 1e-3 for one in params)
    assert min(one["l2"] for one in params) < 1e-5  # of a uniform distribution, one in a hundred


def test_the_command_line_and_the_file_of_the_best_ask_for_the_run_that_was_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "run.toml"
    config.write_text(
        'loss = [{name = "embed_direction:0.5@linear", options = {concept = "bronze, \\"old\\"\\t#1"}}, '
        '{name = "embed_preserve", options = {neutral = ["a, b", "[c]"]}}]\n'
        'stop_when = ["plateau:9"]\nkeep = "best"\ntf32 = true\nmeasure = "pooled_align"\n'
        "backend_options = {gradient_checkpointing = true}\n",
        encoding="utf-8",
    )
    searches = (
        "--search",
        "initializer=gaussian|kaiming",
        "--search",
        "optimizer.lr=0.001..0.01",
        "--search",
        "rank=2..3",
    )
    more = ("--search", "weight.embed_preserve=0.1..1", "--config", str(config), "--trials", "3", "--json")
    assert sweep(tmp_path / "it", *searches, *more, metric="conditioning_shift") == 0
    answer = json.loads(capsys.readouterr().out)
    best = answer["best"]

    planned = []
    for command in (answer["command"], f"lora-forge run --prompt '{PROMPTS[0]}' --config {answer['config']}"):
        assert lora_forge_main([*_words(command), "--dry-run", "--json"]) == 0
        planned.append(json.loads(capsys.readouterr().out))
    assert planned[0] == planned[1]
    assert planned[0]["rank"] == best["params"]["rank"]
    assert planned[0]["initializer"]["name"] == best["params"]["initializer"]
    assert planned[0]["optimizer"]["options"]["lr"] == best["params"]["optimizer.lr"]
    direction, preserve = planned[0]["loss"]
    assert (direction["weight"], direction["schedule"]) == (0.5, "linear")
    assert direction["options"]["concept"] == 'bronze, "old"\t#1'
    assert (preserve["weight"], preserve["options"]["neutral"]) == (
        best["params"]["weight.embed_preserve"],
        ["a, b", "[c]"],
    )
    assert (planned[0]["stop_when"], planned[0]["keep"], planned[0]["tf32"]) == (["plateau:9"], "best", True)

    run = lora_forge.run(PROMPTS[0], probe=True, **best["settings"])
    assert run.probe is not None
    assert run.probe.conditioning_shift == best["value"]


def _words(command: str) -> list[str]:
    return shlex.split(command)[1:]


def test_a_run_that_fails_costs_its_trial_alone_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    searches = ("--search", "loss.level.bad=true|false", "--search", "loss.level.level=1|2", "--sampler", "grid")
    assert sweep(tmp_path, *WITH_TOYS, "--loss", "level", *searches) == 0
    states = {(line["params"]["loss.level.bad"], line["state"]) for line in lines(tmp_path)}
    assert states == {(True, "failed"), (False, "complete")}
    errors = {line["error"] for line in lines(tmp_path) if line["state"] == "failed"}
    assert all("level" in error and "\n" not in error for error in errors)
    assert next(iter(errors)) in capsys.readouterr().err

    bad = ("--set", "loss.level.bad=true", "--search", "loss.level.level=1|2", "--sampler", "grid")
    assert sweep(tmp_path / "all", *WITH_TOYS, "--loss", "level", *bad) == 1
    assert "no trial of 2 was complete" in capsys.readouterr().err


def test_a_pruner_ends_a_trial_between_two_runs(tmp_path: Path) -> None:
    searches = ("--search", "loss.level.level=1..12", "--sampler", "random", "--seed", "3", "--trials", "14")
    assert sweep(tmp_path, *WITH_TOYS, "--loss", "level", *searches, "--seeds", "2", "--pruner", "median") == 0
    pruned = [line for line in lines(tmp_path) if line["state"] == "pruned"]
    assert pruned
    assert {len(line["values"]) for line in pruned} == {1}
    assert {len(line["values"]) for line in complete(tmp_path)} == {2}
    first = [line["value"] for line in complete(tmp_path)][:5]
    assert all(line["value"] > min(first) for line in pruned)


def test_a_setting_that_was_tried_is_not_trained_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    once = ("--set", f"loss.counted.log={log}", "--search", "loss.counted.power=1|2", "--trials", "8")
    assert sweep(tmp_path, *WITH_TOYS, "--loss", "counted", *once) == 0
    assert len(complete(tmp_path)) == 8
    assert len(log.read_text().splitlines()) == 2 + 2  # each checked, and each trained
    first = {line["params"]["loss.counted.power"]: line for line in reversed(lines(tmp_path))}
    for line in lines(tmp_path):
        same = first[line["params"]["loss.counted.power"]]
        assert line["value"] == same["value"]
        assert line["repeats"] == (None if line is same or line["trial"] == same["trial"] else same["trial"])


def test_what_mattered_is_told_where_optuna_can_tell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    level = ("--search", "loss.level.level=0.1..1.0", "--search", "rank=2..3", "--set", "l2=0", "--json")
    assert sweep(tmp_path, *WITH_TOYS, "--loss", "level", *level, "--trials", "1") == 0
    assert json.loads(capsys.readouterr().out)["importances"] == {}
    assert sweep(tmp_path, *WITH_TOYS, "--loss", "level", *level, "--trials", "16") == 0
    shares = json.loads(capsys.readouterr().out)["importances"]
    assert list(shares) == ["loss.level.level", "rank"]
    assert math.isclose(sum(shares.values()), 1)
