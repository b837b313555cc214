"""A plugin built for version 1 of the plugin API works in this release, and in any later one that speaks version 1.

`data/plugin_api_1.py` is such a plugin, and is never edited. Each `later_…` makes this release a later one, in a way
that the compatibility policy allows.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from distributions import LOSS, Site, pretend_site, write_plugin

import lora_forge
from lora_forge import contracts, events, hookspecs, plugin_rules, plugins, records
from lora_forge.cli.main import main
from lora_forge.errors import RunFailed
from lora_forge.hookspecs import EXTENSION_POINTS, LIFECYCLE_EVENTS, hookspec
from lora_forge.plugins import discover
from lora_forge.records import Spec

FROZEN = Path(__file__).parent / "data" / "plugin_api_1.py"
Patch = pytest.MonkeyPatch
PULL = {
    "scale": 3,
    "power": 1,
    "pooled": True,
    "label": "x",
    "table": "somewhere.txt",
    "part": "penultimate",
    "norm": "one",
    "limit": None,
    "encoders": ["text_encoder_2"],
    "pair": [0.5, 1],
}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: Patch) -> Iterator[Site]:
    monkeypatch.chdir(tmp_path)
    with pretend_site(tmp_path, monkeypatch) as pretended:
        yield pretended


# Later releases


def later_record_fields(patch: Patch) -> None:
    """Every spec that a plugin makes from now on has gained a field."""
    for name in ("InitializerSpec", "LossSpec", "OptimizerSpec", "SaverSpec", "BackendSpec", "ExecutorSpec"):
        patch.setattr(records, name, _gained(getattr(records, name), kw_only=True))


def later_hook_argument(patch: Patch) -> None:
    """Every lifecycle hook has gained an argument, and not even as its last."""
    for name in LIFECYCLE_EVENTS:

        def hook(clock: Any, event: Any) -> None:
            """Observe something, with a clock."""

        hook.__name__ = name
        patch.setattr(hookspecs, name, hookspec(hook))


def later_event_fields(patch: Patch) -> None:
    """Every event, and what it holds of the run, has gained a field."""
    for name in ("RunInfo", "RunStart", "StepFinish", "RunFinish", "RunFailure"):
        _replace(patch, name, _gained(getattr(events, name)), "events", "runner", "training.steps")


def later_contract_fields(patch: Patch) -> None:
    """What plugins are given, and what they make and return, has gained a field."""
    given = ("InitialLayer", "SaveRequest", "BackendRequest", "TargetLayer")
    for name in (*given, "Tokens", "EncoderOutput", "SaveReport"):
        homes = ("contracts", "training.initial", "saving", "model", "plan", "bank", "batch")
        _replace(patch, name, _gained(getattr(contracts, name)), *homes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolverSpec(Spec):
    kind: ClassVar[str] = "solver"


def later_extension_point(patch: Patch) -> None:
    """There is one more kind of thing a plugin can supply."""

    @hookspec
    def lora_forge_solvers() -> Iterable[SolverSpec]:
        """Yield the solvers this plugin supplies."""
        raise NotImplementedError

    patch.setattr(hookspecs, "lora_forge_solvers", lora_forge_solvers, raising=False)
    patch.setattr(lora_forge, "SolverSpec", SolverSpec, raising=False)
    patch.setitem(EXTENSION_POINTS, "solver", ("lora_forge_solvers", SolverSpec))


def later_lifecycle_hook(patch: Patch) -> None:
    """There is one more lifecycle event."""

    @hookspec
    def lora_forge_batch_started(event: Any) -> None:
        """Observe that a batch begins."""

    patch.setattr(hookspecs, "lora_forge_batch_started", lora_forge_batch_started, raising=False)
    for module in (hookspecs, plugin_rules, plugins):
        patch.setattr(module, "LIFECYCLE_EVENTS", (*LIFECYCLE_EVENTS, "lora_forge_batch_started"))


def later_api(patch: Patch) -> None:
    """Version 2 is spoken too."""
    for module in (hookspecs, plugin_rules):
        patch.setattr(module, "SPOKEN_APIS", (1, 2))


def this_release(patch: Patch) -> None:
    """Nothing has changed."""


RELEASES = (
    this_release,
    later_record_fields,
    later_hook_argument,
    later_event_fields,
    later_contract_fields,
    later_extension_point,
    later_lifecycle_hook,
    later_api,
)


def _gained(old: type, kw_only: bool = False) -> type:
    """The dataclass with one field more, which has a default."""
    extra: list[tuple[str, Any, Any]] = [("gained", str, dataclasses.field(default="new"))]
    return dataclasses.make_dataclass(old.__name__, extra, bases=(old,), frozen=True, kw_only=kw_only)


def _replace(patch: Patch, name: str, value: type, *modules: str) -> None:
    for module in modules:
        home = importlib.import_module(f"lora_forge.{module}")
        if hasattr(home, name):
            patch.setattr(home, name, value)


@pytest.fixture(params=RELEASES, ids=lambda release: release.__name__)
def release(request: pytest.FixtureRequest, monkeypatch: Patch) -> str:
    """This release, or a later one."""
    change: Callable[[Patch], None] = request.param
    change(monkeypatch)
    return change.__name__


# The frozen plugin


def heard() -> list[tuple[str, dict[str, Any]]]:
    """What the frozen plugin has heard of since it was last loaded."""
    noted: list[tuple[str, dict[str, Any]]] = sys.modules[f"lora_forge_file_{FROZEN.stem}"].HEARD
    return noted


def run_frozen(model: str | Path = "tiny_sdxl", **settings: Any) -> lora_forge.RunResult:
    """A run with the frozen plugin's everything, but for what the settings say."""
    asked = {
        "loss": [{"name": "pull", "weight": 0.5, "options": PULL}, "drift"],
        "initializer": {"name": "even", "options": {"bound": 0.1}},
        "optimizer": {"name": "descent", "options": {"lr": 0.5}},
        "saver": "pickled",
        "iterations": 2,
    }
    return lora_forge.run("an owl", str(model), plugins=[FROZEN], **{**asked, **settings})


def test_the_frozen_plugin_is_whole_and_supplies_all_it_did(release: str) -> None:
    registry = discover([FROZEN], strict=True)
    names = {
        kind: {one.spec.name for one in there if one.plugin.distribution == FROZEN.stem}
        for kind, there in registry.supplied.items()
    }
    assert {kind: found for kind, found in names.items() if found} == {
        "initializer": {"even"},
        "loss": {"pull", "drift"},
        "optimizer": {"descent", "single"},
        "saver": {"pickled"},
        "backend": {"smallest"},
    }
    (observed,) = [hooks for plugin, hooks in registry.observers() if plugin.distribution == FROZEN.stem]
    assert set(observed) == {"lora_forge_run_started", "lora_forge_step_finished", *LIFECYCLE_EVENTS[2:4]}


def test_a_run_uses_its_loss_initializer_optimizer_and_saver_and_it_hears_of_everything(
    site: Site, release: str
) -> None:
    result = run_frozen(output="owl", l2=0.0)
    assert result.path == Path("owl.pt")
    assert not [warning for warning in result.warnings if "failed" in warning]
    kinds = [kind for kind, _ in heard()]
    assert kinds == ["run_started", "iterations", "step_finished", "step_finished", "run_finished"]
    (_, started), (_, planned), (_, first), _, (_, finished) = heard()
    assert started == {
        "id": result.run.id,
        "batch_id": result.run.batch_id,
        "prompt": "an owl",
        "model": "tiny_sdxl",
        "iterations": 2,
        "seed": 0,
        "rank": 4,
    }
    assert planned == {"iterations": 2}
    assert finished == {"id": result.run.id, "path": result.path, "loss": result.loss_after}
    assert first["loss"] == pytest.approx(0.5 * first["terms"]["pull"] + first["terms"]["drift"], rel=1e-5)
    assert result.loss_after < result.loss_before

    content = torch.load(Path("owl.pt"))
    assert (content["prompt"], content["rank"], content["family"]) == ("an owl", 4, "sdxl")
    record = json.loads(content["metadata"]["lora_forge"])["run"]
    assert record["loss"][0]["options"] == {**PULL, "scale": 3.0, "pair": [0.5, 1.0]}
    read = sys.modules[f"lora_forge_file_{FROZEN.stem}"].read_pickled(result.path)
    for component, layers in result.weights.items():
        for layer, pair in layers.items():
            change = result.alpha / result.rank * pair["lora_B"] @ pair["lora_A"]
            assert torch.allclose(read[component][layer], change)


def test_a_run_uses_all_it_supplies_on_a_family_that_is_newer_than_it(site: Site) -> None:
    options = {**PULL, "encoders": ["text_encoder"]}
    result = run_frozen("tiny_sd15", loss=[{"name": "pull", "options": options}, "drift"], output="owl", l2=0.0)
    assert [kind for kind, _ in heard()].count("step_finished") == 2
    assert result.loss_after < result.loss_before
    content = torch.load("owl.pt")
    assert (content["prompt"], content["family"]) == ("an owl", "sd15")
    assert content["weights"].keys() == result.weights.keys()


def test_one_step_is_its_initializers_weights_moved_by_its_optimizer_along_the_gradient(release: str) -> None:
    before = run_frozen(iterations=0, l2=0.0)
    after = run_frozen(iterations=1, l2=0.0)
    (norms,) = [values["norms"] for kind, values in heard() if kind == "step_finished"]
    for component in ("text_encoder", "text_encoder_2"):
        square = 0.0
        for layer, start in before.weights[component].items():
            assert 0 <= float(start["lora_A"].min()) < float(start["lora_A"].max()) <= 0.1
            assert not start["lora_B"].any()
            moved = after.weights[component][layer]
            square += sum(float((moved[name] - start[name]).double().square().sum()) for name in start)
        # float32 weights near 0.1 hold a step to about 1e-8.
        assert math.sqrt(square) == pytest.approx(0.5 * norms[component], rel=1e-3, abs=1e-6)
    assert norms["text_encoder_2"] > 0


def test_its_backend_carries_a_run_with_an_optimizer_of_one_instance_per_prompt(site: Site, release: str) -> None:
    layers = {"first": [8, 6], "second": [6, 8], "projection": [5, 6]}
    config = {
        "backend": "smallest",
        "base_model": "smallest",
        "lora_rank": 2,
        "lora_alpha": 2,
        "target_layers_encoder": list(layers),
        "layer_dimensions_encoder": layers,
    }
    Path("smallest_config.json").write_text(json.dumps(config))
    options = {"name": "pull", "options": {"pooled": True}}
    result = run_frozen("smallest_config.json", loss=options, optimizer="single", output="owl.pt")
    assert set(result.weights) == {"encoder"}
    assert set(result.weights["encoder"]) == set(layers)
    assert result.loss_after < result.loss_before
    assert result.usage == "smallest.load('owl.pt')"
    assert [kind for kind, _ in heard()].count("eval") == 1


def test_it_hears_of_a_failure(release: str) -> None:
    with pytest.raises(RunFailed) as caught:
        run_frozen(loss={"name": "pull", "options": {"power": 10_000, "scale": 1000}})
    kind, values = heard()[-1]
    assert (kind, values["error"]) == ("run_failed", str(caught.value))
    assert "pull became infinite at step 1" in values["error"]


def test_a_plugin_of_a_later_release_uses_the_new_beside_it(site: Site, monkeypatch: Patch) -> None:
    later_extension_point(monkeypatch)
    later_record_fields(monkeypatch)
    source = """
    from lora_forge import SolverSpec, LossSpec, hookimpl

    @hookimpl
    def lora_forge_solvers():
        yield SolverSpec(name="closed_form", summary="no steps", factory=len)

    @hookimpl
    def lora_forge_losses():
        yield LossSpec(name="fresh", summary="s", factory=len, gained="by a plugin")
    """
    site.install("newer", source)
    registry = discover([FROZEN], strict=True)
    assert registry.resolve("solver", "closed_form").spec.summary == "no steps"
    assert getattr(registry.resolve("loss", "fresh").spec, "gained", None) == "by a plugin"
    assert getattr(registry.resolve("loss", "pull").spec, "gained", None) == "new"


def test_an_observer_is_given_what_it_asks_for_by_name(site: Site, monkeypatch: Patch) -> None:
    later_hook_argument(monkeypatch)
    source = """
    from lora_forge import hookimpl
    heard = []

    @hookimpl
    def lora_forge_run_started(event):
        heard.append(event)

    @hookimpl
    def lora_forge_run_finished():
        heard.append("nothing asked")
    """
    module = site.install("watcher", source)
    registry = discover(strict=True)
    event = object()
    assert registry.notify("lora_forge_run_started", event) == []
    assert registry.notify("lora_forge_run_finished", event) == []
    assert sys.modules[module].heard == [event, "nothing asked"]


# Versions of the API


@pytest.mark.parametrize(
    ("api", "remedy"),
    [
        (0, "another version of the plugin"),
        (2, "a newer lora-forge"),
        ("x", "another version of the plugin"),
        ("1", "another version of the plugin"),
        (None, "another version of the plugin"),
    ],
)
@pytest.mark.parametrize(
    "body",
    [
        LOSS.format(name="wonder"),
        "from lora_forge import WonderSpec\n",
        LOSS.format(name="wonder") + "\n@hookimpl\ndef lora_forge_wonders():\n    yield 1\n",
    ],
    ids=["would work", "fails at import", "has a hook we do not know"],
)
def test_a_plugin_for_an_api_that_is_not_spoken_is_named_as_such(
    site: Site, capsys: pytest.CaptureFixture[str], api: Any, remedy: str, body: str
) -> None:
    site.install("other-age", f"__lora_forge_api__ = {api!r}\n{body}")
    why = f"built for plugin API {api!r}; lora-forge {lora_forge.__version__} speaks 1: install {remedy}"
    registry = discover()
    assert [(plugin.id, plugin.error) for plugin in registry.broken] == [("other-age:plugin", why)]
    assert registry.candidates("loss", "wonder") == []
    capsys.readouterr()
    assert main(["run", "--prompt", "an owl", "--model", "tiny_sdxl", "--loss", "wonder"]) == 2
    assert f"it may have come from other-age:plugin, which is broken: {why}" in capsys.readouterr().err


@pytest.mark.parametrize("head", ["", "__lora_forge_api__ = 1\n"])
@pytest.mark.parametrize("later", [False, True])
def test_a_plugin_that_names_no_api_counts_as_of_version_1(
    site: Site, monkeypatch: Patch, head: str, later: bool
) -> None:
    if later:
        later_api(monkeypatch)
    site.install("plain", head + LOSS.format(name="small"))
    assert discover(strict=True).resolve("loss", "small").plugin.id == "plain:plugin"


def test_a_plugin_file_for_another_api_is_refused_in_words(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    mine = write_plugin(Path("mine.py"), "__lora_forge_api__ = 2\n" + LOSS.format(name="small"))
    assert main(["plugins", "show", "adamw", "--plugin", str(mine)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "plugin file 'mine.py': built for plugin API 2; lora-forge" in printed.err
