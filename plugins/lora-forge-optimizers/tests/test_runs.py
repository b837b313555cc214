"""Runs with each optimizer: what they come to, what is recorded, and what is said when one cannot run."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
import torch
from cases import SPECS, TELLING, each, needs_bitsandbytes, options
from watched import Watched, apart, flat_weights, steppers, watched

import lora_forge
from lora_forge import RunResult
from lora_forge.cli.main import main
from lora_forge.clock import Clock
from lora_forge.config.run import read_run_config
from lora_forge.errors import ConfigError, PluginError
from lora_forge.model import open_model
from lora_forge.options import describe_options
from lora_forge.plan import Request, make_plan
from lora_forge.plugins import discover
from lora_forge.runner import forge
from lora_forge.testing import check_optimizer

PROMPTS = ("a steampunk owl", "bond", "a squirrel in a forest")


def run(name: str, model: str = "tiny_sdxl", *, iterations: int = 6, **chosen: Any) -> RunResult:
    optimizer = {"name": name, "options": chosen}
    return lora_forge.run(PROMPTS[0], model, iterations=iterations, optimizer=optimizer)


def together(name: str, **chosen: Any) -> tuple[list[RunResult], list[Watched]]:
    """All prompts in one bank, each with a seed of its own."""
    settings = {"model": "tiny_sdxl", "iterations": 6, "optimizer": {"name": name, "options": chosen}}
    registry = discover()
    plan = make_plan(read_run_config([{"prompt": PROMPTS[0], **settings}]), registry)
    requests = [Request(prompt, None, seed, None) for seed, prompt in enumerate(PROMPTS)]
    with watched() as optimizers:
        results = forge(plan, requests, open_model(plan), registry, Clock())
    return results, steppers(optimizers, 6)


@each
def test_it_keeps_the_contract_of_an_optimizer(name: str, check_plugin: Callable[..., None]) -> None:
    check_plugin(name, kind="optimizer")  # as installed
    check_optimizer(SPECS[name], options(name, **TELLING[name]))


@each
def test_its_summary_names_its_paper_and_each_option_says_what_it_is_and_within_what_bounds(name: str) -> None:
    assert re.search(r"arXiv:\d{4}\.\d{5}", SPECS[name].summary)
    for option in describe_options(SPECS[name].options):
        assert option.help, option.name
        assert option.bounds or option.type == "bool" or option.name == "schedule", option.name


@each
@pytest.mark.parametrize("model", ["tiny_sdxl", "tiny_sd15"])
def test_it_lowers_the_loss(name: str, model: str) -> None:
    result = run(name, model, iterations=15)
    # Fifteen steps at 1e-4 move a tiny model a little; half of what `adamw` does is no accident.
    adamw = run("adamw", model, iterations=15)
    assert result.loss_before == adamw.loss_before
    assert result.loss_before - result.loss_after > 0.4 * (adamw.loss_before - adamw.loss_after) > 0


@each
def test_three_prompts_together_come_out_as_each_does_alone(name: str) -> None:
    results, optimizers = together(name, **TELLING[name])
    assert len(optimizers) == (1 if name in ("lion", "schedule_free_adamw") else len(PROMPTS))
    for seed, result in enumerate(results):
        alone = lora_forge.run(
            PROMPTS[seed], "tiny_sdxl", iterations=6, seed=seed, optimizer={"name": name, "options": TELLING[name]}
        )
        difference = apart(flat_weights(result), flat_weights(alone))
        # The encoders may round otherwise for three prompts than for one. That turns Lion's sign, or an 8-bit
        # number into its neighbour, where a gradient is next to nothing.
        assert difference < 1e-4
        assert apart(flat_weights(result), flat_weights(results[seed - 1])) > 0.5, "the prompts are all the same"


def test_each_prompt_has_prodigys_estimate_to_itself() -> None:
    _, optimizers = together("prodigy", **TELLING["prodigy"])
    estimates = {one.optimizer.param_groups[0]["d"] for one in optimizers}
    assert len(estimates) == len(PROMPTS)
    assert min(estimates) > 1e-4


def test_prodigy_runs_at_its_own_learning_rate_and_the_others_at_the_model_configs() -> None:
    registry = discover()
    found = {}
    for name in SPECS:
        plan = make_plan(read_run_config([{"prompt": "an owl", "model": "tiny_sdxl", "optimizer": name}]), registry)
        found[name] = plan.optimizer.options.lr
    assert plan.model.learning_rate == 1e-4
    assert found == {name: 1.0 if name == "prodigy" else 1e-4 for name in SPECS}
    chosen = {"name": "prodigy", "options": {"lr": 0.5}}
    plan = make_plan(read_run_config([{"prompt": "an owl", "model": "tiny_sdxl", "optimizer": chosen}]), registry)
    assert plan.optimizer.options.lr == 0.5


@each
def test_the_record_of_a_run_has_who_supplied_it_and_all_its_options(name: str) -> None:
    chosen = {"warmup": 2} if name == "schedule_free_adamw" else {"schedule": "linear", "warmup": 2}
    record = json.loads(run(name, iterations=1, **chosen).metadata["lora_forge"])["run"]["optimizer"]
    assert (record["name"], record["distribution"]) == (name, "lora-forge-optimizers")
    assert record["version"] == version("lora-forge-optimizers")
    assert set(record["options"]) == set(options(name).__dataclass_fields__)
    assert {key: record["options"][key] for key in chosen} == chosen


@each
def test_its_library_prints_nothing_among_the_answers(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(name, iterations=1)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "module", "install"),
    [
        ("prodigy", "prodigyopt", "prodigyopt"),
        ("lion", "lion_pytorch", "lion-pytorch"),
        ("adamw8bit", "bitsandbytes", "bitsandbytes"),
        ("schedule_free_adamw", "schedulefree", "schedulefree"),
    ],
)
def test_a_missing_library_is_named_with_how_to_install_it_and_troubles_no_other_optimizer(
    name: str, module: str, install: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    expected = f"optimizer '{name}' needs {install}, which is not installed; pip install {install}"
    with pytest.raises(PluginError) as caught:
        run(name)
    assert str(caught.value) == expected
    words = ["run", "--prompt", "an owl", "--model", "tiny_sdxl", "--optimizer", name]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert expected in " ".join(said.split())
    assert "Traceback" not in said
    assert run("adafactor", iterations=1).loss_before


def test_a_library_that_cannot_be_imported_is_named_with_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_forge_optimizers import factories

    def fail(name: str) -> None:
        raise OSError(f"lib{name}.so:\ncannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(PluginError) as caught:
        factories.schedule_free_adamw([], options("schedule_free_adamw"))
    assert str(caught.value) == (
        "optimizer 'schedule_free_adamw' needs schedulefree, which cannot be imported: "
        "OSError: libschedulefree.so: cannot open shared object file"
    )


@needs_bitsandbytes
def test_where_bitsandbytes_has_nothing_to_run_that_is_said_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lora_forge_optimizers import factories

    bitsandbytes = pytest.importorskip("bitsandbytes")

    def fail(*_: object) -> None:
        raise RuntimeError("no kernel\nimage is available")

    factories._try_8bit.cache_clear()
    monkeypatch.setattr(bitsandbytes.optim.AdamW8bit, "update_step", fail)
    with watched() as optimizers, pytest.raises(PluginError) as caught:
        run("adamw8bit")
    assert str(caught.value) == (
        f"optimizer 'adamw8bit' cannot run: bitsandbytes {bitsandbytes.__version__} does not work on cpu here "
        "(RuntimeError: no kernel image is available); update it, use another device, or --optimizer adamw"
    )
    assert all(len(one.start) == 2 for one in optimizers), "a step of the run itself was taken"


@needs_bitsandbytes
def test_adamw8bit_keeps_the_state_of_large_matrices_in_8_bits() -> None:
    from lora_forge_optimizers import factories

    large, small = (torch.nn.Parameter(torch.ones(size)) for size in ((64, 64), (64, 63)))
    optimizer = factories.adamw8bit([large, small], options("adamw8bit"), 1)
    for parameter in (large, small):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.state[large]["state1"].dtype == torch.uint8
    assert optimizer.state[small]["state1"].dtype == torch.float32


def test_adafactors_own_schedule_goes_with_no_other() -> None:
    for chosen in ({"relative_step": True, "schedule": "cosine"}, {"relative_step": True, "warmup": 3}):
        with pytest.raises(ConfigError, match="adafactor: relative_step is a schedule of its own"):
            run("adafactor", **chosen)
    with pytest.raises(ConfigError, match="adafactor: warmup_init needs relative_step"):
        run("adafactor", warmup_init=True)


def test_none_of_the_libraries_is_imported_before_an_optimizer_is_used() -> None:
    libraries = ["prodigyopt", "lion_pytorch", "transformers", "bitsandbytes", "schedulefree", "torch"]
    script = (
        "import sys; from lora_forge.cli.main import main; main(['plugins', 'show', 'prodigy']); "
        f"print('imported:', [name for name in {libraries} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "lora-forge-optimizers" in done.stdout
    assert done.stdout.endswith("imported: []\n")
