"""Every hook's docstring carries an example that runs as it stands."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from distributions import Site, pretend_site

import lora_forge
from lora_forge import hookspecs
from lora_forge.cli.main import main
from lora_forge.errors import RunFailed
from lora_forge.hookspecs import EXTENSION_POINTS, LIFECYCLE_EVENTS
from lora_forge.plugins import discover
from lora_forge.records import BackendSpec, Spec

HOOKS = {
    name: hook
    for name, hook in vars(hookspecs).items()
    if isinstance(hook, FunctionType) and name.startswith("lora_forge_")
}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with pretend_site(tmp_path, monkeypatch) as pretended:
        yield pretended


def example(site: Site, hook_name: str) -> Path:
    """The example of a hook's docstring, as a plugin file."""
    (code,) = re.findall(r"```python\n(.*?)```", inspect.getdoc(HOOKS[hook_name]) or "", re.DOTALL)
    file = site.folder / f"{hook_name}_example.py"
    file.write_text(code)
    return file


def supplied(kind: str, file: Path) -> Spec:
    """The one spec that a plugin file supplies."""
    (spec,) = (one.spec for one in discover([file]).supplied[kind] if one.plugin.distribution == file.stem)
    return spec


def test_every_extension_point_and_lifecycle_event_is_a_hook_and_every_hook_is_one_of_them() -> None:
    points = {hook_name for hook_name, _ in EXTENSION_POINTS.values()}
    assert points | set(LIFECYCLE_EVENTS) == set(HOOKS)
    assert not points & set(LIFECYCLE_EVENTS)
    assert all(getattr(hook, "lora_forge_spec", None) is not None for hook in HOOKS.values())


def test_every_kind_of_spec_is_that_of_its_extension_point() -> None:
    assert {kind: spec_type.kind for kind, (_, spec_type) in EXTENSION_POINTS.items()} == {
        k: k for k in EXTENSION_POINTS
    }


@pytest.mark.parametrize("hook_name", HOOKS)
def test_every_hook_has_an_example_that_is_a_plugin_which_implements_it(site: Site, hook_name: str) -> None:
    file = example(site, hook_name)
    assert f"\ndef {hook_name}(" in file.read_text()
    registry = discover([file])
    assert registry.broken == []
    kinds = [kind for kind, (point, _) in EXTENSION_POINTS.items() if point == hook_name]
    assert [one.spec.kind for specs in registry.supplied.values() for one in specs if not one.is_builtin] == kinds


def test_the_initializer_example_makes_the_first_weights(site: Site, model: str) -> None:
    file = example(site, "lora_forge_initializers")
    name = supplied("initializer", file).name
    result = lora_forge.run("an owl", model, iterations=0, initializer=name, plugins=[file])
    for layers in result.weights.values():
        for pair in layers.values():
            assert torch.equal(pair["lora_A"], torch.ones_like(pair["lora_A"]))
            assert torch.equal(pair["lora_B"], torch.zeros_like(pair["lora_B"]))
    assert lora_forge.run("an owl", model, iterations=2, initializer=name, plugins=[file]).loss_after < 0


def test_the_loss_example_is_a_term_that_goes_down(site: Site, model: str) -> None:
    file = example(site, "lora_forge_losses")
    name = supplied("loss", file).name
    result = lora_forge.run("an owl", model, iterations=2, loss=name, plugins=[file])
    assert [set(step.terms) for step in result.steps] == [{name}, {name}]
    assert result.after.terms[name] < result.before.terms[name]


def test_the_optimizer_example_makes_the_steps(site: Site, model: str) -> None:
    file = example(site, "lora_forge_optimizers")
    name = supplied("optimizer", file).name
    settings = {"plugins": [file], "optimizer": name, "l2": 0.25}
    start = lora_forge.run("an owl", model, iterations=0, **settings)
    result = lora_forge.run("an owl", model, iterations=2, **settings)
    # A layer out of reach feels L2 alone: under plain descent at 0.1 each step takes 0.1 · 2 · 0.25 of it away.
    for layer, pair in start.weights["unet"].items():
        torch.testing.assert_close(result.weights["unet"][layer]["lora_A"], pair["lora_A"] * 0.95**2)


def test_the_saver_example_writes_a_file_that_holds_the_weights(site: Site, model: str) -> None:
    file = example(site, "lora_forge_savers")
    spec: Any = supplied("saver", file)
    output = site.folder / f"owl{spec.suffix}"
    result = lora_forge.run("an owl", model, iterations=2, saver=spec.name, plugins=[file], output=output)
    saved = torch.load(output)
    assert saved["prompt"] == "an owl"
    assert saved["weights"].keys() == result.weights.keys()
    for component, layers in result.weights.items():
        for layer, pair in layers.items():
            assert all(torch.equal(saved["weights"][component][layer][name], pair[name]) for name in pair)


def test_the_backend_example_is_a_backend_by_name(site: Site) -> None:
    spec = supplied("backend", example(site, "lora_forge_backends"))
    assert isinstance(spec, BackendSpec)
    assert set(spec.encoders) <= set(spec.components)
    assert spec.conditioning == ("text_encoder last",)


def test_the_executor_example_makes_what_the_built_in_one_makes(site: Site) -> None:
    file = example(site, "lora_forge_executors")
    (site.folder / "prompts.txt").write_text("an owl\na brass fox\n")
    made = {}
    for executor in ("local", supplied("executor", file).name):
        job = ["batch", str(site.folder / "prompts.txt"), "--output-dir", str(site.folder / executor)]
        settings = ["--model", "tiny_sdxl", "--iterations", "1", "--batch-size", "1", "--plugin", str(file)]
        assert main([*job, *settings, "--executor", executor]) == 0
        made[executor] = {path.name: path.read_bytes() for path in (site.folder / executor).glob("*.safetensors")}
    one, other = made.values()
    assert len(one) == 2
    assert one == other


def test_the_lifecycle_examples_hear_of_a_run(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    heard = ("lora_forge_run_started", "lora_forge_step_finished", "lora_forge_run_finished")
    files = [example(site, hook_name) for hook_name in heard]
    result = lora_forge.run("an owl", "tiny_sdxl", iterations=2, plugins=files)
    steps = [f"{i} {step.loss} {step.terms}" for i, step in enumerate(result.steps, 1)]
    assert capsys.readouterr().out.splitlines() == ["an owl", *steps, f"None {result.loss_after}"]


def test_the_failure_example_hears_of_a_failure(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    file = example(site, "lora_forge_run_failed")
    bad = site.folder / "bad.py"
    bad.write_text(example(site, "lora_forge_losses").read_text().replace("batch.adapted()", "batch.nothing()"))
    with pytest.raises(RunFailed) as caught:
        lora_forge.run("an owl", "tiny_sdxl", iterations=2, loss="quiet", plugins=[file, bad])
    assert capsys.readouterr().out.splitlines() == [f"an owl {caught.value}"]
