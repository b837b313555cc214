"""Observers hear of every run, in order; what they raise ends nothing, but for Ctrl-C."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributions import Site, pretend_site, write_plugin

import lora_forge
from lora_forge.cli.main import main
from lora_forge.errors import ObjectiveError, RunFailed

HOOKS = ("run_started", "step_finished", "run_finished", "run_failed")
DIARY = """
import dataclasses, json
from lora_forge import hookimpl

def note(kind, event, **values):
    with open({diary!r}, "a") as diary:
        diary.write(json.dumps(dict(kind=kind, run=dataclasses.asdict(event.run), **values)) + "\\n")

@hookimpl
def lora_forge_run_started(event):
    note("run_started", event)

@hookimpl
def lora_forge_step_finished(event):
    note("step_finished", event, step=event.step, loss=event.loss, terms=dict(event.terms), l2=event.l2)

@hookimpl
def lora_forge_run_finished(event):
    path = event.result.path
    note("run_finished", event, loss=event.result.loss_after, written=bool(path and path.is_file()))

@hookimpl
def lora_forge_run_failed(event):
    note("run_failed", event, error=str(event.error), kind_of_error=type(event.error).__name__)
"""
LOSSES = """
from lora_forge import LossSpec, hookimpl

def large(batch):
    return -sum(output.pooled.abs().mean(1) for output in batch.adapted().values())

class NanAtThird:
    def __init__(self):
        self.calls = 0
    def __call__(self, batch):
        self.calls += 1
        return large(batch) * (float("nan") if self.calls >= 3 else 1.0)

def constant(batch):
    return next(iter(batch.frozen().values())).pooled.mean(1)

@hookimpl
def lora_forge_losses():
    for factory in (large, NanAtThird, constant):
        yield LossSpec(name=factory.__name__.lower(), summary="s", factory=factory)
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with pretend_site(tmp_path, monkeypatch) as pretended:
        yield pretended


@pytest.fixture
def diary(site: Site) -> Path:
    """A plugin file that writes down what it hears."""
    return write_plugin(site.folder / "diary.py", DIARY.format(diary=str(site.folder / "diary.jsonl")))


@pytest.fixture
def losses(site: Site) -> Path:
    return write_plugin(site.folder / "losses.py", LOSSES)


def heard(site: Site) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (site.folder / "diary.jsonl").read_text().splitlines()]


def raiser(site: Site, hook: str, raised: str, name: str = "clumsy") -> Path:
    source = f"""
    from lora_forge import hookimpl

    @hookimpl
    def lora_forge_{hook}(event):
        raise {raised}
    """
    return write_plugin(site.folder / f"{name}.py", source)


def test_observers_hear_the_start_every_step_in_order_and_the_finish(
    model: str, site: Site, diary: Path, losses: Path
) -> None:
    output = site.folder / "out.safetensors"
    settings = {"iterations": 30, "seed": 4, "l2": 0.1, "loss": ["embedding_magnitude", "large:0.5"]}
    result = lora_forge.run("an owl", model, plugins=[diary, losses], output=output, **settings)
    first, *steps, last = heard(site)
    assert first["kind"] == "run_started"
    assert [step["kind"] for step in steps] == ["step_finished"] * 30
    assert (last["kind"], last["loss"], last["written"]) == ("run_finished", result.loss_after, True)
    assert [step["step"] for step in steps] == list(range(1, 31))
    assert [(s["loss"], s["terms"], s["l2"]) for s in steps] == [(s.loss, s.terms, s.l2) for s in result.steps]
    for step in steps:
        assert set(step["terms"]) == {"embedding_magnitude", "large"}
        weighted = step["terms"]["embedding_magnitude"] + 0.5 * step["terms"]["large"]
        assert step["loss"] == pytest.approx(weighted + step["l2"], rel=1e-5)
    start = lora_forge.run("an owl", model, iterations=0, seed=4).weights
    squares = sum(float(pair["lora_A"].square().sum()) for layers in start.values() for pair in layers.values())
    assert steps[0]["l2"] == pytest.approx(0.1 * squares, rel=1e-5)


def test_every_event_of_a_run_names_it(site: Site, diary: Path) -> None:
    result = lora_forge.run("an owl", "tiny_sdxl", iterations=2, seed=4, plugins=[diary])
    runs = [event["run"] for event in heard(site)]
    assert len(runs) == 4
    assert all(run == runs[0] for run in runs)
    assert (runs[0]["prompt"], runs[0]["model"], runs[0]["iterations"], runs[0]["seed"]) == (
        "an owl",
        "tiny_sdxl",
        2,
        4,
    )
    assert runs[0]["id"] == result.run.id
    assert len(runs[0]["id"]) == len(runs[0]["batch_id"]) == 12


def test_a_run_without_steps_starts_and_finishes(site: Site, diary: Path) -> None:
    lora_forge.run("an owl", "tiny_sdxl", iterations=0, plugins=[diary])
    assert [event["kind"] for event in heard(site)] == ["run_started", "run_finished"]


@pytest.mark.parametrize(("loss", "error", "steps"), [("nanatthird", RunFailed, 2), ("constant", ObjectiveError, 0)])
def test_observers_hear_of_a_failure_and_of_the_good_steps_before_it(
    site: Site, diary: Path, losses: Path, loss: str, error: type[Exception], steps: int
) -> None:
    output = site.folder / "out.safetensors"
    with pytest.raises(error) as caught:
        lora_forge.run("an owl", "tiny_sdxl", iterations=5, loss=loss, plugins=[diary, losses], output=output)
    first, *between, last = heard(site)
    assert first["kind"] == "run_started"
    assert [(event["kind"], event["step"]) for event in between] == [("step_finished", i + 1) for i in range(steps)]
    assert (last["kind"], last["error"], last["kind_of_error"]) == ("run_failed", str(caught.value), error.__name__)
    assert not output.exists()


@pytest.mark.parametrize("raised", ["ValueError('oh\\nno')", "SystemExit(7)"])
@pytest.mark.parametrize("hook", HOOKS[:3])
def test_an_observer_that_raises_ends_nothing_and_is_one_warning_in_the_result(
    site: Site, hook: str, raised: str
) -> None:
    clumsy = raiser(site, hook, raised)
    output = site.folder / "out.safetensors"
    result = lora_forge.run("an owl", "tiny_sdxl", iterations=3, plugins=[clumsy], output=output)
    why = "ValueError: oh no" if "Value" in raised else "SystemExit: 7"
    warnings = [warning for warning in result.warnings if "clumsy" in warning]
    assert warnings == [f"clumsy:file failed in lora_forge_{hook}: {why}"]
    assert len(result.steps) == 3
    assert output.is_file()


def test_an_observer_that_raises_changes_no_byte_of_the_file(site: Site) -> None:
    clumsy = raiser(site, "step_finished", "ValueError")
    contents = []
    for folder, plugins in (("a", [clumsy]), ("b", [])):
        file = site.folder / folder / "owl.safetensors"
        lora_forge.run("an owl", "tiny_sdxl", iterations=2, plugins=plugins, output=file)
        contents.append(file.read_bytes())
    assert contents[0] == contents[1]


@pytest.mark.parametrize("hook", HOOKS[:3])
def test_the_command_line_shows_a_raising_observer_as_one_line_on_stderr(
    site: Site, hook: str, capsys: pytest.CaptureFixture[str]
) -> None:
    clumsy = raiser(site, hook, "SystemExit(7)")
    assert main(_command(site, clumsy)) == 0
    captured = capsys.readouterr()
    assert [line for line in captured.err.splitlines() if "clumsy" in line] == [
        f"warning: clumsy:file failed in lora_forge_{hook}: SystemExit: 7"
    ]
    assert "Traceback" not in captured.err


def test_an_observer_that_raises_on_hearing_of_a_failure_hides_neither(
    site: Site, losses: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clumsy = raiser(site, "run_failed", "ValueError('oh no')")
    command = [*_command(site, clumsy), "--plugin", str(losses), "--loss", "nanatthird"]
    assert main(command) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lora-forge: ")]
    assert lines == [
        "lora-forge: warning: clumsy:file failed in lora_forge_run_failed: ValueError: oh no",
        "lora-forge: error: nanatthird became NaN at step 3; nothing was written",
    ]


@pytest.mark.parametrize("hook", HOOKS[:2])
def test_ctrl_c_in_an_observer_ends_the_run_and_nothing_is_written(
    site: Site, hook: str, capsys: pytest.CaptureFixture[str]
) -> None:
    impatient = raiser(site, hook, "KeyboardInterrupt")
    before = set(site.folder.iterdir())
    assert main(_command(site, impatient)) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "lora-forge: interrupted; no partial file is left"
    assert {path for path in set(site.folder.iterdir()) - before if path.name != "__pycache__"} == set()


def test_observers_hear_of_ctrl_c_as_a_failure(site: Site, diary: Path) -> None:
    impatient = raiser(site, "step_finished", "KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        lora_forge.run("an owl", "tiny_sdxl", iterations=2, plugins=[impatient, diary])
    assert (heard(site)[-1]["kind"], heard(site)[-1]["kind_of_error"]) == ("run_failed", "KeyboardInterrupt")


@pytest.mark.parametrize("raiser_first", [True, False])
def test_an_observer_that_raises_keeps_no_other_from_hearing(site: Site, diary: Path, raiser_first: bool) -> None:
    source = "from lora_forge import hookimpl\n" + "".join(
        f"@hookimpl\ndef lora_forge_{hook}(event):\n    raise ValueError\n" for hook in HOOKS
    )
    clumsy = write_plugin(site.folder / "clumsy.py", source)
    plugins = [clumsy, diary] if raiser_first else [diary, clumsy]
    result = lora_forge.run("an owl", "tiny_sdxl", iterations=2, plugins=plugins)
    assert [event["kind"] for event in heard(site)] == ["run_started", *["step_finished"] * 2, "run_finished"]
    assert sum("clumsy" in warning for warning in result.warnings) == 3


def test_an_observer_may_do_without_the_event(site: Site) -> None:
    source = f"""
    from lora_forge import hookimpl

    @hookimpl
    def lora_forge_run_finished():
        open({str(site.folder / "bell")!r}, "w").close()
    """
    lora_forge.run("an owl", "tiny_sdxl", iterations=0, plugins=[write_plugin(site.folder / "bell.py", source)])
    assert (site.folder / "bell").is_file()


def test_what_a_plugin_prints_stays_out_of_the_json_on_stdout(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    source = """
    from lora_forge import hookimpl
    print("imported")

    @hookimpl
    def lora_forge_step_finished(event):
        print("a step")
    """
    chatty = write_plugin(site.folder / "chatty.py", source)
    assert main([*_command(site, chatty), "--json"]) == 0
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)["steps"]) == 3
    assert captured.err.splitlines().count("a step") == 3
    assert "imported" in captured.err.splitlines()


def _command(site: Site, plugin: Path) -> list[str]:
    """A run of three steps into the site's folder."""
    run = ["run", "--prompt", "an owl", "--model", "tiny_sdxl", "--iterations", "3"]
    return [*run, "--plugin", str(plugin), "--output", str(site.folder / "out.safetensors")]
