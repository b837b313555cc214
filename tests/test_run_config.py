"""Run configs: defaults, model config, file and command line, in that order; all mistakes at once."""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_forge.cli.main import main
from lora_forge.cli.run import command
from lora_forge.config.model import shipped_folder
from lora_forge.config.run import Choice, RunConfig, collect_run_config, parse_name, read_run_config, read_toml
from lora_forge.errors import ConfigError
from lora_forge.options import Text
from lora_forge.plan import make_plan
from lora_forge.plugins import discover

PLUGIN = """
from dataclasses import dataclass
from lora_forge import LossSpec, OptimizerSpec, hookimpl

@dataclass(frozen=True)
class Options:
    power: float = 1.0
    words: tuple[str, ...] = ()

@dataclass(frozen=True)
class Descent:
    rate: float = 0.1

@hookimpl
def lora_forge_losses():
    yield LossSpec(name="quiet", summary="quiet", options=Options, factory="nowhere:Nothing")

@hookimpl
def lora_forge_optimizers():
    yield OptimizerSpec(name="descent", summary="no lr", options=Descent, factory="nowhere:Nothing")
"""


@pytest.fixture
def dry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`dry(*arguments, toml=…)`: the resolved run of a command line, as `--dry-run --json` prints it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quiet.py").write_text(PLUGIN, encoding="utf-8")

    def run(*arguments: str, toml: str = "", model: str = "tiny_sdxl") -> dict[str, Any]:
        (tmp_path / "run.toml").write_text(f'prompt = "an owl"\nmodel = {json.dumps(model)}\n{toml}', encoding="utf-8")
        code = main(["run", "--config", "run.toml", *arguments, "--dry-run", "--json"])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        result: dict[str, Any] = json.loads(printed.out)
        return result

    return run


def own_model(folder: Path, **changes: Any) -> str:
    """A copy of tiny_sdxl's model config with changes; a change of None leaves a key out."""
    data = json.loads((shipped_folder() / "tiny_sdxl_config.json").read_text(encoding="utf-8")) | changes
    path = folder / "own_config.json"
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("key", "default", "in_model", "in_file", "given"),
    [
        ("iterations", 50, "iterations", "iterations = 8", "--iterations=9"),
        ("l2", 1e-5, "regularization_strength", "l2 = 8", "--l2=9"),
        ("lr", 1e-4, "learning_rate", "optimizer.options.lr = 8", "--optimizer-opt=lr=9"),
        ("rank", None, "lora_rank", "rank = 8", "--rank=9"),
        ("alpha", None, "lora_alpha", "alpha = 8", "--alpha=9"),
    ],
)
def test_the_command_line_wins_over_the_file_over_the_model_config_over_the_default(
    dry: Any, tmp_path: Path, key: str, default: float | None, in_model: str, in_file: str, given: str
) -> None:
    def value(*arguments: str, toml: str = "", model: str) -> Any:
        record = dry(*arguments, toml=toml, model=model)
        return record["optimizer"]["options"]["lr"] if key == "lr" else record[key]

    if default is not None:  # a model config may leave the key out
        assert value(model=own_model(tmp_path, **{in_model: None})) == default
    model = own_model(tmp_path, **{in_model: 7})
    assert value(model=model) == 7
    assert value(model=model, toml=in_file) == 8
    assert value(given, model=model) == 9
    assert value(given, model=model, toml=in_file) == 9


def test_zero_wins_over_what_is_below_it(dry: Any) -> None:
    record = dry("--iterations", "0", "--l2", "0", toml="iterations = 8\nl2 = 0.5")
    assert (record["iterations"], record["l2"]) == (0, 0)
    record = dry(toml="iterations = 0\nl2 = 0")
    assert (record["iterations"], record["l2"]) == (0, 0)


def test_a_model_configs_learning_rate_goes_only_to_an_optimizer_that_has_one(dry: Any, tmp_path: Path) -> None:
    model = own_model(tmp_path, learning_rate=0.25)
    assert dry("--plugin=quiet.py", "--optimizer=descent", model=model)["optimizer"]["options"] == {"rate": 0.1}
    assert dry("--optimizer=adamw", model=model)["optimizer"]["options"]["lr"] == 0.25
    assert dry("--optimizer-opt=eps=0.5", model=model)["optimizer"]["options"] == {
        "schedule": "constant",
        "warmup": 0,
        "lr": 0.25,
        "betas": [0.9, 0.999],
        "eps": 0.5,
        "weight_decay": 0.01,
    }


def test_options_of_the_command_line_add_to_those_of_the_file_for_the_same_optimizer(dry: Any) -> None:
    toml = 'plugins = ["quiet.py"]\n[optimizer]\nname = "adamw"\noptions = {lr = 0.5, eps = 0.25}'
    assert dry("--optimizer-opt=lr=1", toml=toml)["optimizer"]["options"]["lr"] == 1
    assert dry("--optimizer-opt=lr=1", toml=toml)["optimizer"]["options"]["eps"] == 0.25
    assert dry("--optimizer=adamw", toml=toml)["optimizer"]["options"]["eps"] == 0.25
    assert dry("--optimizer=descent", toml=toml)["optimizer"]["options"] == {"rate": 0.1}


def losses(record: dict[str, Any]) -> list[tuple[str, float, dict[str, Any]]]:
    return [(loss["name"], loss["weight"], loss["options"]) for loss in record["loss"]]


MAGNITUDE = {"tokens": "all", "layer": "last"}
QUIET = {"power": 1.0, "words": []}


@pytest.mark.parametrize(
    ("toml", "arguments", "expected"),
    [
        ("", (), [("embedding_magnitude", 1, MAGNITUDE)]),
        ("", ("--loss=embedding_magnitude:0.5",), [("embedding_magnitude", 0.5, MAGNITUDE)]),
        ("", ("--loss=lora-forge:embedding_magnitude:-2e-1",), [("embedding_magnitude", -0.2, MAGNITUDE)]),
        (
            "",
            ("--loss=embedding_magnitude", "--loss=quiet:0.5"),
            [("embedding_magnitude", 1, MAGNITUDE), ("quiet", 0.5, QUIET)],
        ),
        ("", ("--loss=quiet:file:quiet:2",), None),
        ("", ("--loss=quiet:quiet:2",), [("quiet", 2, QUIET)]),
        ("", ("--loss=quiet", "--loss-opt=power=3"), [("quiet", 1, QUIET | {"power": 3})]),
        (
            "",
            ("--loss=embedding_magnitude", "--loss=quiet", "--loss-opt=quiet.power=3", "--loss-opt=quiet.words=a,b"),
            [("embedding_magnitude", 1, MAGNITUDE), ("quiet", 1, {"power": 3, "words": ["a", "b"]})],
        ),
        ('loss = "quiet:0.25"', (), [("quiet", 0.25, QUIET)]),
        ('loss = {name = "quiet", weight = 2, options = {power = 3}}', (), [("quiet", 2, QUIET | {"power": 3})]),
        (
            'loss = {name = "quiet", options = {power = 3}}',
            ("--loss-opt=power=4",),
            [("quiet", 1, QUIET | {"power": 4})],
        ),
        (
            'loss = ["embedding_magnitude:2", {name = "quiet", weight = 3}]',
            (),
            [("embedding_magnitude", 2, MAGNITUDE), ("quiet", 3, QUIET)],
        ),
        (
            '[[loss]]\nname = "quiet"\n[[loss]]\nname = "quiet"\nweight = 2',
            (),
            [("quiet", 1, QUIET), ("quiet", 2, QUIET)],
        ),
        ('loss = ["quiet:7", "quiet"]', ("--loss=embedding_magnitude",), [("embedding_magnitude", 1, MAGNITUDE)]),
    ],
)
def test_the_objective_can_be_spelled_in_many_ways(
    dry: Any, toml: str, arguments: tuple[str, ...], expected: list[Any] | None
) -> None:
    if expected is None:
        with pytest.raises(AssertionError, match="unknown loss 'quiet:file:quiet'"):
            dry("--plugin=quiet.py", *arguments, toml=toml)
    else:
        assert losses(dry("--plugin=quiet.py", *arguments, toml=toml)) == expected


def naive_name(text: str) -> tuple[str, float | None]:
    parts = text.split(":")
    try:
        weight = float(parts[-1])
    except ValueError:
        return text, None
    return (":".join(parts[:-1]), weight) if len(parts) > 1 else (text, None)


@given(st.lists(st.sampled_from(["a", "dist", "", "0.5", "-1", "1e3", "x1", "1"]), max_size=4).map(":".join))
def test_what_follows_the_last_colon_is_a_weight_if_it_is_a_number(text: str) -> None:
    assert parse_name(text) == naive_name(text)


def test_a_file_holds_everything_the_command_line_can_and_nothing_else() -> None:
    keys = set()
    for parameter in command.params:
        name = parameter.name or ""
        if name == "backend_opt":
            name = "backend_options"
        keys.add(name.removesuffix("_opt"))
    assert keys - {"config", "like", "as_json", "dry_run"} == {field.name for field in dataclasses.fields(RunConfig)}


def test_every_key_means_the_same_in_a_file_and_on_the_command_line(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "prompt": "an owl",
        "prompt_2": "a fox",
        "model": "tiny_sdxl",
        "base_model": "some/where",
        "rank": 3,
        "alpha": 1.5,
        "iterations": 7,
        "l2": 0.5,
        "seed": 11,
        "device": "cpu",
        "dtype": "bfloat16",
        "inert": "drop",
        "init_from": "a.safetensors",
        "keep": "best",
        "stop_when": ["plateau:3", "loss:-2"],
        "probe": True,
        "paraphrases": ["{prompt}, again"],
        "controls": ["two red chairs", "a bowl, of cherries"],
        "strength": 0.5,
        "output": "b.safetensors",
        "overwrite": True,
        "dtype_out": "float16",
        "tf32": True,
        "sidecar": True,
        "report": True,
        "preview": True,
        "date": "2026-01-31",
        "plugins": ["p.py", "q.py"],
        "strict_plugins": True,
    }
    scalars = {field.name for field in dataclasses.fields(RunConfig) if "help" in field.metadata}
    assert set(values) == scalars - {"target_shift"}  # which excludes strength
    path = tmp_path / "run.toml"
    path.write_text("\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items()), encoding="utf-8")
    texts = {
        key: [Text(item) for item in value] if isinstance(value, list) else value if value is True else Text(value)
        for key, value in values.items()
    }
    assert read_run_config([read_toml(path)]) == read_run_config([texts])
    assert read_run_config([{"target_shift": 0.1}]) == read_run_config([{"target_shift": Text("0.1")}])


def mistakes(*layers: dict[str, Any]) -> dict[str, str]:
    return {problem.key: problem.message for problem in collect_run_config(layers)[1]}


@pytest.mark.parametrize(
    ("data", "key", "words"),
    [
        ({"iteratons": 5}, "iteratons", "unknown key; did you mean 'iterations'?"),
        ({"loss": {"name": "a", "wieght": 1}}, "loss.wieght", "did you mean 'weight'"),
        ({"loss": {"weight": 1}}, "loss.name", "is missing"),
        ({"loss": []}, "loss", "at least one loss"),
        ({"loss": 3}, "loss", "expected a name or a table"),
        ({"loss": "a@falling"}, "loss.schedule", "expected a schedule such as linear"),
        ({"measure": [{"name": "a", "wieght": 1}]}, "measure.wieght", "did you mean 'weight'"),
        ({"keep": "bset"}, "keep", "did you mean 'best'"),
        ({"stop_when": ["plateau"]}, "stop_when", "expected plateau:STEPS"),
        ({"stop_when": 3}, "stop_when", "expected a list"),
        ({"saver": []}, "saver", "at least one saver"),
        ({"saver": {"name": "a", "weight": 1}}, "saver.weight", "unknown key"),
        ({"output": ""}, "output", "expected a path or a URL"),
        ({"loss": {"name": "a", "weight": float("inf")}}, "loss.weight", "finite"),
        ({"loss": "a:nan"}, "loss.weight", "finite"),
        ({"loss": {"name": "a", "weight": 10**400}}, "loss.weight", "finite"),
        ({"loss": {"name": "a", "options": 3}}, "loss.options", "expected a table"),
        ({"loss": {"options": {"b.x": 1}}}, "loss.options.b.x", "no loss 'b' here; there is embedding_magnitude"),
        ({"optimizer": {"name": "a", "weight": 1}}, "optimizer.weight", "unknown key"),
        ({"optimizer": ["a"]}, "optimizer", "expected a name or a table"),
        ({"backend_options": 3}, "backend_options", "expected a table"),
        ({"iterations": "5"}, "iterations", "expected an integer"),
        ({"iterations": 5.0}, "iterations", "expected an integer"),
        ({"iterations": True}, "iterations", "expected an integer"),
        ({"iterations": -1}, "iterations", "≥ 0"),
        ({"rank": 0}, "rank", "≥ 1"),
        ({"alpha": 0}, "alpha", "> 0"),
        ({"l2": -1e-9}, "l2", "≥ 0"),
        ({"seed": -1}, "seed", "≥ 0"),
        ({"target_shift": 0}, "target_shift", "> 0"),
        ({"strength": float("nan")}, "strength", "finite"),
        ({"strength": 1, "target_shift": 0.1}, "strength", "not both"),
        ({"dtype": "flaot32"}, "dtype", "did you mean 'float32'"),
        ({"inert": "dorp"}, "inert", "did you mean 'drop'"),
        ({"device": "gpu"}, "device", "unknown device 'gpu'; did you mean 'cuda'"),
        ({"device": "cuda:x"}, "device", "did you mean 'cuda'"),
        ({"device": "cpu:1"}, "device", "did you mean 'cpu'"),
        ({"device": ""}, "device", "known: auto, cpu, cuda, mps"),
        ({"date": "yesterday"}, "date", "expected a date"),
        ({"date": "2026-02-30"}, "date", "expected a date"),
        ({"date": 2026}, "date", "expected text"),
        ({"plugins": "a.py"}, "plugins", "expected a list"),
        ({"output": ""}, "output", "expected a path"),
        ({"overwrite": "yes"}, "overwrite", "true or false"),
    ],
)
def test_a_mistake_in_a_run_config_is_named_with_its_key(data: dict[str, Any], key: str, words: str) -> None:
    found = mistakes(data)
    assert list(found) == [key]
    assert words in found[key]


@pytest.mark.parametrize(
    "date", ["2026-01-31", "2026-01-31T12:00:00", "2026-01-31T12:00:00Z", datetime.date(2026, 1, 31)]
)
def test_a_date_is_an_iso_date_or_time_or_tomls_own(date: Any) -> None:
    config = read_run_config([{"date": date}])
    assert config.date is not None
    assert config.date.startswith("2026-01-31")


def test_options_of_a_loss_must_say_whose_they_are_when_there_are_several() -> None:
    layers = {"loss": ["a", "b"]}, {"loss": {"options": {"power": 1}}}
    assert mistakes(*layers) == {"loss.options.power": "say whose: one of a, b, as NAME.power"}
    config, problems = collect_run_config([layers[0], {"loss": {"options": {"b.power": 1}}}])
    assert not problems
    assert config.loss == (Choice("a"), Choice("b", {"power": 1}))


def test_all_mistakes_of_a_file_are_reported_at_once_those_of_plugins_included(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'prompt = " "\nmodel = "tiny_sdxx"\niteratons = 5\nrank = 0\ndevice = "gpu"\ndate = "x"\n'
        'loss = ["embeding_magnitude", "nope"]\ninitializer = "gausian"\nsaver = "x"\ninit_from = "missing"\n'
        'optimizer = {name = "adamw", options = {lrr = 1, eps = "x"}}',
        encoding="utf-8",
    )
    assert main(["run", "--config", str(path)]) == 2
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "lora-forge: error: run.toml: 13 mistakes"
    for start in (
        "prompt: is blank",
        "model: unknown model 'tiny_sdxx'; did you mean 'tiny_sdxl'?",
        "iteratons: unknown key; did you mean 'iterations'?",
        "rank: must be ≥ 1",
        "device: unknown device",
        "date: expected a date",
        "loss: unknown loss 'embeding_magnitude'; did you mean 'embedding_magnitude'?",
        "loss: unknown loss 'nope'",
        "initializer: unknown initializer 'gausian'; did you mean 'gaussian'?",
        "saver: unknown saver 'x'",
        "init_from: 'missing' does not exist",
        "adamw.lrr: unknown option; did you mean 'lr'?",
        "adamw.eps: expected a number",
    ):
        assert sum(line.strip().startswith(start) for line in lines) == 1, start
    assert len(lines) == 13


@pytest.mark.parametrize(
    "content", [b"prompt = ", b"= 3", b"[loss", b"a = 1\na = 2", b"\xff\xfe", b'a = "\x01"', b"a = 0x" + b"f" * 5000]
)
def test_toml_that_is_not_toml_is_one_mistake_of_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"run\.toml: not valid TOML") as raised:
        read_toml(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["missing.toml", ".", "x" * 300])
def test_a_run_config_that_cannot_be_read_is_one_mistake(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--config", str(tmp_path / name)]) == 2
    printed = capsys.readouterr().err
    assert "run config cannot be read" in printed
    assert printed.count("\n") == 1


REGISTRY = discover()
FIELDS = [field.name for field in dataclasses.fields(RunConfig)]
SCALARS = (
    st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["adamw", "a:0.5", "embedding_magnitude", "cpu", "float32"])
    | st.dates()
    | st.datetimes()
    | st.times()
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "weight", "options", "x"]) | st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
TABLES = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=6), VALUES, max_size=6)


@given(layers=st.lists(TABLES, max_size=2))
@settings(max_examples=300, deadline=None)
def test_arbitrary_toml_is_a_plan_or_mistakes_and_nothing_else(layers: list[dict[str, Any]]) -> None:
    config, problems = collect_run_config(layers)
    raised: ConfigError | None = None
    try:
        read_run_config(layers)
    except ConfigError as error:
        raised = error
    assert (raised.problems if raised else ()) == tuple(problems)
    raised, plan = None, None
    try:
        plan = make_plan(dataclasses.replace(config, prompt="an owl", model="tiny_sdxl"), REGISTRY, mistakes=problems)
    except ConfigError as error:
        raised = error
    assert (plan is None) == (raised is not None)
    assert set(problems) <= set(raised.problems if raised else ())
