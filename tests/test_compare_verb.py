"""`lora-forge compare`: a row for every LoRA, what they cost each other, restarts, failures, reports made again."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_forge
from lora_forge.cli.main import main
from lora_forge.comparison.results import read_results

PROMPTS = ("a steampunk owl", "a fox", "two tea cups")
FAST = ("--model", "tiny_sdxl", "--iterations", "3", "--threads", "1", "--batch-size", "2")
FAR = ("--optimizer-opt", "lr=0.01")  # so that three steps show
FEW = ("--seeds", "2", "--random", "2")
OBJECTIVES = ("size", "0.5*pool + 2*size")
PLUGIN = """
import os, signal
import torch
from lora_forge import LossSpec, SaverSpec, hookimpl
from lora_forge.builtin.savers import universal
from lora_forge.errors import ObjectiveError

def size(batch):
    return sum(out.last_hidden_state.square().mean((1, 2)) for out in batch.adapted().values())

def pool(batch):
    return sum(out.pooled.square().mean(1) for out in batch.adapted().values())

def picky(batch):
    if any("fox" in text for text in next(iter(batch.texts.values()))):
        raise ValueError("no foxes")
    return size(batch)

def impossible(batch):
    raise ObjectiveError("nothing of that kind here")

def deadly(request):
    if request.prompt == os.environ.get("DEADLY") and "pool" in str(request.path):
        request.path.write_bytes(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    return universal(request)

@hookimpl
def lora_forge_losses():
    for loss in (size, pool, picky, impossible):
        yield LossSpec(name=loss.__name__, summary="for a test", formula=f"{loss.__name__} of it", factory=loss)

@hookimpl
def lora_forge_savers():
    yield SaverSpec(name="deadly", summary="for a test", factory=deadly)
"""


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    """A job sets torch's threads for its process; other tests have theirs back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished comparison in `out`, and what was printed of it in `shown.txt`."""
    folder = tmp_path_factory.mktemp("finished")
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as shown:
        ready()
        assert compare() == 0
        Path("shown.txt").write_text(shown.getvalue())
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ready()


@pytest.fixture
def again(finished: Path, here: None) -> None:
    """The finished comparison, to go on with."""
    shutil.copytree(finished, ".", dirs_exist_ok=True)


def ready() -> None:
    Path("plugin.py").write_text(PLUGIN)
    Path("prompts.txt").write_text("\n".join(PROMPTS))


def arguments(*more: str, objectives: tuple[str, ...] = OBJECTIVES, out: str = "out") -> list[str]:
    losses = [word for one in objectives for word in ("--loss", one)]
    given = ["compare", "--prompts", "prompts.txt", *losses, "--output-dir", out, "--plugin", "plugin.py"]
    return [*given, *FEW, *FAST, *FAR, *more]


def compare(*more: str, **settings: Any) -> int:
    return main(arguments(*more, **settings))


def refusal(capsys: pytest.CaptureFixture[str], *given: str) -> str:
    """What a command that cannot be done as asked says."""
    capsys.readouterr()
    assert main(list(given)) == 2
    return capsys.readouterr().err.removeprefix("lora-forge: error: ").strip()


def loras(out: str = "out") -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in Path(out).rglob("*.safetensors")}


def test_there_is_a_row_for_each_objective_prompt_and_seed_in_that_order(again: None) -> None:
    told = read_results("out")
    assert [(row.objective, row.prompt, row.seed) for row in told.rows] == [
        (objective, prompt, seed) for objective in OBJECTIVES for prompt in PROMPTS for seed in (0, 1)
    ]
    for row in told.rows:
        measured = row.measured
        assert measured is not None
        assert (Path("out") / (measured.file or "")).is_file()
        assert measured.iterations == len(measured.steps) == 3
        assert measured.steps[0] == measured.loss.before
        assert list(measured.cross) == list(OBJECTIVES)
        assert measured.conditioning_shift == measured.specificity.own
        assert measured.delta_norm == pytest.approx(
            math.hypot(*map(float, filter(None, measured.component_norms.values())))
        )
    header = told.header
    assert [one.formula for one in header.objectives] == ["size of it", "0.5 · [pool of it] + 2 · [size of it]"]
    assert [one.needs for one in header.objectives] == [("text",)] * 2
    assert (header.prompts, header.seeds, header.iterations, header.seconds) == (3, (0, 1), 3, None)
    assert len(header.controls) == 2
    assert all("{prompt}" in text for text in header.paraphrases)
    reach = header.objectives[0].reach
    assert reach is not None
    assert reach["text_encoder"] == (12, 12)
    assert reach["unet"][0] == 0
    assert "report: out/report.html" in Path("shown.txt").read_text()
    assert "0.5*pool + 2*size" in Path("out/report.html").read_text()


def test_the_cross_table_holds_what_a_single_run_measures_of_the_other_objective(again: None) -> None:
    for row in read_results("out").of("size")[:3]:
        single = lora_forge.run(
            row.prompt,
            "tiny_sdxl",
            plugins=["plugin.py"],
            seed=row.seed,
            iterations=3,
            optimizer={"name": "adamw", "options": {"lr": 0.01}},
            loss="size",
            measure=["pool", "size"],
        )
        assert row.measured is not None
        own, other = (row.measured.cross[name] for name in OBJECTIVES)
        for index, when in enumerate(("before", "after")):
            pool, size = (single.measured[label][index] for label in ("pool", "size"))
            assert pool is not None
            assert size is not None
            assert getattr(own, when) == pytest.approx(size, rel=1e-5)
            assert getattr(other, when) == pytest.approx(0.5 * pool + 2 * size, rel=1e-5)
        assert own.random not in (None, own.before, own.after)


def test_given_again_it_makes_nothing_and_writes_the_same_results(again: None) -> None:
    written, times = Path("out/results.jsonl").read_bytes(), {path: path.stat().st_mtime_ns for path in lora_paths()}
    Path("out/results.jsonl").unlink()
    assert compare("--no-report") == 0
    assert Path("out/results.jsonl").read_bytes() == written
    assert {path: path.stat().st_mtime_ns for path in lora_paths()} == times


def lora_paths() -> list[Path]:
    return sorted(path for path in Path("out").rglob("*.safetensors") if not path.name.startswith("."))


def test_killed_and_begun_again_it_makes_what_is_missing_and_ends_as_if_nothing_had_been() -> None:
    given = arguments("--saver", "deadly", "--no-report")
    died = subprocess.run(
        [sys.executable, "-m", "lora_forge", *given],
        env={**os.environ, "DEADLY": PROMPTS[2], "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert died.returncode == -signal.SIGKILL
    assert not Path("out/results.jsonl").exists()
    before = {path: path.stat().st_mtime_ns for path in lora_paths()}
    assert len(PROMPTS) * 2 <= len(before) < len(PROMPTS) * 4
    assert main(given) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert compare("--saver", "deadly", "--no-report", out="undisturbed") == 0
    assert loras() == loras("undisturbed")
    assert not [path for path in Path("out").rglob("*") if path.name.startswith(".")]

    def numbers(out: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in Path(out, "results.jsonl").read_text().splitlines()[1:]]
        timed = ("seconds", "seconds_per_step", "peak_memory")
        return [{key: value for key, value in line.items() if key not in timed} for line in lines]

    assert numbers("out") == numbers("undisturbed")


def test_what_is_added_is_made_and_nothing_else(again: None) -> None:
    before = {path: path.stat().st_mtime_ns for path in lora_paths()}
    assert compare("--no-report", "--seeds", "3") == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(read_results("out").rows) == 2 * 3 * 3


def test_the_order_of_objectives_may_change_but_not_what_is_measured(
    again: None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in lora_paths()}
    assert compare("--no-report", objectives=OBJECTIVES[::-1]) == 0
    assert {path: path.stat().st_mtime_ns for path in lora_paths()} == before
    assert [one.name for one in read_results("out").header.objectives] == list(OBJECTIVES[::-1])
    for others in ((*OBJECTIVES, "picky"), OBJECTIVES[:1]):  # nor are results of others lost
        said = refusal(capsys, *arguments(objectives=others))
        assert "'out' holds a comparison of other objectives" in said
        assert "or another --output-dir" in said
    assert [one.name for one in read_results("out").header.objectives] == list(OBJECTIVES[::-1])


def test_a_lora_that_fails_is_a_row_that_says_why_and_costs_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(objectives=("size", "picky")) == 1
    failed = [row for row in read_results("out").rows if row.error]
    assert [(row.objective, row.prompt, row.seed) for row in failed] == [("picky", "a fox", seed) for seed in (0, 1)]
    assert all(row.error == "loss 'picky' failed: ValueError: no foxes" for row in failed)
    assert len(read_results("out").of("picky")) == 4
    assert "picky: 2 of 6 runs failed" in capsys.readouterr().out


def test_an_objective_that_cannot_be_trained_at_all_costs_no_other() -> None:
    assert compare("--no-report", objectives=("impossible", "size")) == 1
    told = read_results("out")
    assert {row.error for row in told.rows if row.objective == "impossible"} == {"nothing of that kind here"}
    assert len(told.of("size")) == 6
    assert told.header.objectives[0].reach is None


def test_every_mistake_in_the_objectives_is_told_before_anything_is_made(capsys: pytest.CaptureFixture[str]) -> None:
    told = refusal(capsys, *arguments(objectives=("siez", "pool +", "size(option=1)")))
    assert "unknown loss 'siez'; did you mean 'size'?" in told
    assert "loss 'pool +': at the end: expected the name of a loss" in told
    assert "size.option: unknown option" in told
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--loss", "size"), "the objective 'size' is given twice"),
        (("--limit", "4"), "--limit: 4 prompts were asked for, 'prompts.txt' has 3"),
        (("--random", "65"), "--random: 65 control prompts were asked for, the list that ships has 64"),
        (("--controls", "none.txt"), "--controls 'none.txt' cannot be read"),
        (("--paraphrases", "prompts.txt"), "the paraphrase 'a steampunk owl' has no {prompt} in it"),
        (("--images", "--output-dir", "memory://out"), "pictures are drawn of files on this machine"),
        (("--from", "out"), "--from makes a report of results there are"),
        (("--prompts", "rows.jsonl"), "'rows.jsonl', row 1: a comparison gives all prompts the same settings"),
        (("--prompts", "bad.jsonl"), "'bad.jsonl', row 1: prompt: is blank"),
        (("--config", "run.toml"), "run.toml: loss: is not for a run config of a comparison"),
        (("--rank", "0"), "rank: must be"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_line(
    more: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("rows.jsonl").write_text('{"prompt": "an owl", "iterations": 7}')
    Path("bad.jsonl").write_text('{"prompt": " "}')
    Path("run.toml").write_text('loss = "size"\niterations = 5\n')
    said = refusal(capsys, *arguments(*more))
    assert told in said
    assert "\n" not in said
    assert not Path("out").exists()


def test_helping_refusing_and_looking_again_import_no_model_library(again: None) -> None:
    script = """
import sys
from lora_forge.cli.main import main
wrong = "compare --prompts prompts.txt --loss no_such_loss --output-dir new --model tiny_sdxl".split()
for given in (["compare", "--help"], wrong, ["compare", "--from", "out", "--no-report"]):
    main(given)
    heavy = {"torch", "transformers", "diffusers", "peft"} & set(sys.modules)
    assert not heavy, (given, heavy)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("option", ["--prompts", "--loss", "--output-dir"])
def test_what_is_missing_is_asked_for(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"--prompts": "prompts.txt", "--loss": "size", "--output-dir": "out"}
    rest = [word for pair in given.items() if pair[0] != option for word in pair]
    assert refusal(capsys, "compare", *rest) == f"give {option}, or a finished comparison with --from"


def test_seconds_are_a_budget_for_all() -> None:
    given = [
        word
        for word in arguments("--seconds", "0.2", "--no-report", "--limit", "2")
        if word not in ("--iterations", "3")
    ]
    assert main(given) == 0
    told = read_results("out")
    assert (told.header.iterations, told.header.seconds) == (None, 0.2)
    for row in told.rows:
        assert row.measured is not None
        assert 1 <= row.measured.iterations < 100_000


def test_prompts_and_controls_are_drawn_the_same_every_time() -> None:
    Path("many.txt").write_text("\n".join(f"prompt {number}" for number in range(40)))
    drawn = []
    few = ("--prompts", "many.txt", "--limit", "3", "--controls", "many.txt", "--seeds", "1", "--no-report")
    for out in ("one", "two"):
        assert compare(*few, objectives=OBJECTIVES[:1], out=out) == 0
        told = read_results(out)
        drawn.append(([row.prompt for row in told.of("size")], told.header.controls))
    assert drawn[0] == drawn[1]
    prompts, controls = drawn[0]
    assert prompts != ["prompt 0", "prompt 1", "prompt 2"]
    assert prompts == sorted(prompts, key=lambda one: int(one.split()[1]))
    assert len(controls) == 2


def test_the_report_is_made_again_of_the_results_alone(again: None, capsys: pytest.CaptureFixture[str]) -> None:
    page = Path("out/report.html").read_bytes()
    Path("elsewhere").mkdir()
    Path("out/results.jsonl").rename("elsewhere/results.jsonl")
    assert main(["compare", "--from", "elsewhere"]) == 0
    shown = capsys.readouterr().out
    assert shown == Path("shown.txt").read_text().replace("out/report.html", "elsewhere/report.html")
    assert Path("elsewhere/report.html").read_bytes() == page
    Path("elsewhere/report.html").unlink()
    assert main(["compare", "--from", "elsewhere/results.jsonl", "--no-report"]) == 0
    assert not Path("elsewhere/report.html").exists()
    assert capsys.readouterr().out == shown.replace("report: elsewhere/report.html\n", "")


def test_json_alone_is_on_stdout(again: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare("--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["output_dir"], told["report"], told["loras"], told["failed"]) == ("out", "out/report.html", 12, 0)
    assert [one["name"] for one in told["objectives"]] == list(OBJECTIVES)
    assert told["verdicts"]


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process can be reset on Linux alone")
def test_peak_memory_is_kept_for_a_comparison_that_goes_on(again: None) -> None:
    first = {row.objective: row.measured.peak_memory for row in read_results("out").rows if row.measured}
    assert all(peak is not None and peak > 50_000_000 for peak in first.values())
    Path("out", read_results("out").of("size")[0].measured.file).unlink()  # type: ignore[union-attr,arg-type]
    assert compare("--no-report") == 0
    second = {row.objective: row.measured.peak_memory for row in read_results("out").rows if row.measured}
    assert second["size"] >= first["size"]  # type: ignore[operator]
    assert second[OBJECTIVES[1]] == first[OBJECTIVES[1]]


def test_images_are_of_the_first_prompts_and_a_control_and_stay_in_the_report(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from PIL import Image

    assert compare("--limit", "1", "--images", objectives=OBJECTIVES[:1]) == 0
    (row, other) = read_results("out").rows
    assert row.measured is not None
    assert other.measured is not None
    assert other.measured.image is None  # of the second seed
    picture = Path("out", row.measured.image or "")
    with Image.open(picture) as image:
        assert min(image.size) > 192
    assert "data:image/jpeg" in Path("out/report.html").read_text()
    drawn = picture.stat().st_mtime_ns
    assert compare("--limit", "1", objectives=OBJECTIVES[:1]) == 0
    assert read_results("out").rows[0].measured == row.measured
    assert compare("--limit", "1", "--images", objectives=OBJECTIVES[:1]) == 0
    assert picture.stat().st_mtime_ns == drawn


def test_every_option_of_its_own_is_on_its_page() -> None:
    from lora_forge.cli.batch import command as batch
    from lora_forge.cli.compare import command

    page = (Path(__file__).parent.parent / "docs" / "compare.md").read_text(encoding="utf-8")
    of_batch = {name for parameter in batch.params for name in parameter.opts} - {"--loss", "--output-dir", "--json"}
    own = [name for parameter in command.params for name in parameter.opts if name not in of_batch]
    assert "--images" in own
    assert [name for name in own if f"`{name}`" not in page] == []


def test_the_budget_is_that_of_the_objectives_that_take_steps_and_one_step_costs_what_it_cost_the_batch() -> None:
    assert compare("--stop-when", "loss:1e9", "--no-report", "--seeds", "1") == 0
    told = read_results("out")
    assert told.header.iterations == 3
    for row in told.rows:  # all stop before the first update, and their batch's first step has a price all the same
        assert row.measured is not None
        assert row.measured.iterations == 0
        assert row.measured.seconds_per_step is not None
        assert row.measured.seconds_per_step > 0


def test_a_schedule_over_nobody_knows_how_many_steps_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    given = arguments("--seconds", "1", objectives=("size@linear", "pool"))
    given = [word for word in given if word not in ("--iterations", "3")]
    assert "size@linear: the schedule of size goes over all steps" in refusal(capsys, *given)
