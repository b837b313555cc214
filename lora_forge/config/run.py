"""Run configs: everything one run was asked to do, from defaults, a TOML file, and the command line."""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Literal, get_type_hints

from lora_forge.config.stopping import StopRule
from lora_forge.errors import ConfigError, Problem, nearest
from lora_forge.files.header import url_of
from lora_forge.options import Unfit, check_bounds, read_value
from lora_forge.schedules import TermSchedule

DEFAULT_ITERATIONS = 50
DEFAULT_L2 = 1e-5
DEFAULT_SAVER = "safetensors"
DEVICES = ("auto", "cpu", "cuda", "mps")
_DEVICE = re.compile(r"(auto|cpu|mps|cuda(:\d{1,4})?)\Z")


@dataclass(frozen=True)
class Choice:
    """A plugin by name, and options for it as given (checked once the plugin is known).

    weight, schedule: of a loss; the schedule as `TermSchedule.read` takes it.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    schedule: str = "constant"


def _knob(default: Any, text: str, **bounds: Any) -> Any:
    return field(default=default, metadata={"help": text, **bounds})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything one run was asked to do. None means: as the model config, or the built-in default, says.

    measure: losses that are evaluated before and after, and not trained. probe: measure the shift on `paraphrases` and
    `controls` too, and on a random LoRA of the same size.
    """

    prompt: str = _knob("", "the prompt to make a LoRA for")
    prompt_2: str | None = _knob(None, "another text for the second text encoder")
    model: str = _knob("sdxl_base", "model config: a name, or a path to a JSON file")
    base_model: str | None = _knob(None, "where the weights come from: Hub id, folder or .safetensors")
    rank: int | None = _knob(None, "LoRA rank", min=1)
    alpha: float | None = _knob(None, "LoRA alpha", above=0)
    iterations: int | None = _knob(None, "steps; 0 writes the initial weights", min=0)
    l2: float | None = _knob(None, "strength of the L2 term over all LoRA parameters", min=0)
    seed: int = _knob(0, "seed of the initial weights", min=0, max=2**63 - 1)
    device: str = _knob("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: Literal["float32", "float16", "bfloat16"] = _knob("float32", "of frozen weights and activations")
    tf32: bool = _knob(False, "on CUDA, multiply float32 matrices in TF32: faster, and less exact")
    keep: Literal["last", "best"] = _knob("last", "which iterate: the last, or that with the lowest objective")
    stop_when: tuple[str, ...] = _knob(
        (), "end early: plateau:STEPS[:SHARE], loss:VALUE or seconds:SECONDS; repeatable"
    )
    inert: Literal["keep", "drop", "error"] = _knob("keep", "what to do with layers the objective cannot reach")
    init_from: Path | None = _knob(None, "start from an earlier LoRA file")
    strength: float | None = _knob(None, "scale the finished LoRA by this factor")
    target_shift: float | None = _knob(None, "scale it until the conditioning moves by this share", above=0)
    output: str | None = _knob(None, "the file to write: a path, or a URL such as s3://bucket/owl")
    overwrite: bool = _knob(False, "replace files that exist")
    dtype_out: Literal["float32", "float16", "bfloat16"] = _knob("float32", "of the numbers in the file")
    sidecar: bool | None = _knob(None, "write NAME.json too, where A1111, Forge and InvokeAI find the prompt")
    report: bool = _knob(False, "write NAME.html too: the run in charts")
    preview: bool = _knob(False, "write NAME.grid.png too: images without and with the LoRA")
    date: str | None = _knob(None, "date to store in the file, such as 2026-01-31")
    plugins: tuple[Path, ...] = _knob((), "plugin files to load")
    strict_plugins: bool = _knob(False, "any broken plugin is an error")
    probe: bool = _knob(False, "measure the shift on other prompts too, and of a random LoRA of the same size")
    paraphrases: tuple[str, ...] = _knob((), "the same in other words, {prompt} for the prompt; repeatable")
    controls: tuple[str, ...] = _knob((), "a prompt that has nothing to do with it; repeatable")
    loss: tuple[Choice, ...] = (Choice("embedding_magnitude"),)
    measure: tuple[Choice, ...] = ()
    initializer: Choice = Choice("gaussian")
    optimizer: Choice = Choice("adamw")
    saver: tuple[Choice, ...] = (Choice(DEFAULT_SAVER),)
    backend_options: Mapping[str, Any] = field(default_factory=dict)


_STRUCTURED = ("loss", "measure", "initializer", "optimizer", "saver", "backend_options")
_SEVERAL = ("loss", "measure", "saver")  # kinds of which a run may use more than one
_WEIGHTED = ("loss", "measure")


def read_toml(path: Path) -> dict[str, Any]:
    """A run config file's content. Raises ConfigError when it is missing or is not TOML."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        repr(data)  # raises for an integer too long to be told of
        return data
    except OSError as error:
        raise ConfigError("", [Problem(str(path), f"run config cannot be read: {error.strerror}")]) from error
    except ValueError as error:
        raise ConfigError(path.name, [Problem("", f"not valid TOML: {error}")]) from error


def read_run_config(layers: Sequence[Mapping[str, Any]], *, source: str = "") -> RunConfig:
    """As `collect_run_config`, but raises ConfigError with every mistake."""
    config, problems = collect_run_config(layers)
    if problems:
        raise ConfigError(source, problems)
    return config


def collect_run_config(layers: Sequence[Mapping[str, Any]]) -> tuple[RunConfig, list[Problem]]:
    """A run config from mappings of its keys, later ones winning, and every mistake. `Text` values are parsed.

    `loss` is a name, a table `{name, weight, schedule, options}`, or a list of those, and so are `measure` and, without
    weights, `saver`; `initializer` and `optimizer` are a name or a table `{name, options}`. A loss's name may carry a
    weight and a schedule: `"a:0.5@linear"`.
    Options alone (`{options}`) add to those of a lower layer. A key with a mistake keeps its default.
    """
    problems: list[Problem] = []
    hints = get_type_hints(RunConfig)
    fields = {f.name: f for f in dataclasses.fields(RunConfig)}
    values: dict[str, Any] = {}
    for layer in layers:
        for one, other in (("strength", "target_shift"), ("target_shift", "strength")):
            if layer.get(one) is not None:  # they exclude each other: the later layer wins
                values.pop(other, None)
        for key, value in layer.items():
            if key not in fields:
                problems.append(Problem(key, f"unknown key{nearest(key, fields)}"))
            elif key in _STRUCTURED:
                values[key] = _structured(key, value, values.get(key, _default(fields[key])), problems)
            else:
                try:
                    fit = read_value(hints[key], _CHECKS[key](value) if key in _CHECKS else value)
                    check_bounds(fit, fields[key].metadata)
                    values[key] = fit
                except Unfit as error:
                    problems.append(Problem(key, str(error)))
    if values.get("date") is None and (epoch := os.environ.get("SOURCE_DATE_EPOCH")):
        values["date"] = _day(epoch, problems)
    if values.get("strength") is not None and values.get("target_shift") is not None:
        problems.append(Problem("strength", "give strength or target_shift, not both"))
    return RunConfig(**values), problems


def parse_term(text: str) -> tuple[str, float | None, str | None]:
    """`name`, `name:0.5`, `name@linear:1-30` or `dist:name:0.5@cosine` as a name, a weight and a schedule."""
    named, at, schedule = text.partition("@")
    return *parse_name(named), schedule if at else None


def parse_name(text: str) -> tuple[str, float | None]:
    """`name`, `name:0.5`, `dist:name` or `dist:name:0.5` as a name and a weight."""
    name, colon, last = text.rpartition(":")
    try:
        return (name, float(last)) if colon else (text, None)
    except ValueError:
        return text, None


def _day(epoch: str, problems: list[Problem]) -> str | None:
    """The day (UTC) of a SOURCE_DATE_EPOCH, which stands for the date where none is given."""
    try:
        return datetime.fromtimestamp(int(epoch), UTC).date().isoformat()
    except (ValueError, OverflowError, OSError):
        problems.append(Problem("SOURCE_DATE_EPOCH", f"expected seconds since 1970, got {epoch!r}"))
        return None


def _device(value: Any) -> Any:
    if isinstance(value, str) and not _DEVICE.match(value):
        meant = "cuda" if value.lower() in ("gpu", "nvidia") else value
        raise Unfit(f"unknown device {str(value)!r}{nearest(meant, DEVICES)}")
    return value


def _date(value: Any) -> Any:
    """An ISO date or time; TOML has dates of its own."""
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, str):
        try:
            datetime.fromisoformat(value)
        except ValueError:
            raise Unfit(f"expected a date such as 2026-01-31 or 2026-01-31T12:00:00Z, got {str(value)!r}") from None
    return value


def _output(value: Any) -> Any:
    """A path or a URL, as text; Python's callers give paths as such."""
    if isinstance(value, Path) and url_of(value):
        raise Unfit(f"a path keeps one slash of a URL; give the URL as text, got {value!r}")
    # A URL's path, as a result names it, is no PathLike.
    text = str(value) if isinstance(value, os.PathLike) or hasattr(value, "protocol") else value
    if text is not None and not (isinstance(text, str) and text):
        raise Unfit(f"expected a path or a URL, got {value!r}")
    return text


_CHECKS: Mapping[str, Callable[[Any], Any]] = {
    "device": _device,
    "date": _date,
    "output": _output,
    "stop_when": lambda value: _stop_rules(value),
}


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def _structured(key: str, value: Any, below: Any, problems: list[Problem]) -> Any:
    if key == "backend_options":
        return {**below, **_table(key, value, problems)}
    if key not in _SEVERAL:
        return _choice(key, value, below, problems, weighted=False)
    if isinstance(value, Mapping) and set(value) == {"options"}:
        return _add_options(key, below, _table(f"{key}.options", value["options"], problems), problems)
    items = value if isinstance(value, list | tuple) else [value]
    if not items and key != "measure":
        problems.append(Problem(key, f"at least one {key} is needed"))
    choices = [_choice(key, item, None, problems, weighted=key in _WEIGHTED) for item in items]
    known = {one.name: one.options for one in below} if key == "saver" else {}  # a loss may be there twice
    return tuple(
        dataclasses.replace(choice, options={**known.get(choice.name, {}), **choice.options})
        for choice in choices
        if choice is not None
    )


def _choice(key: str, value: Any, below: Choice | None, problems: list[Problem], *, weighted: bool) -> Choice | None:
    table = {"name": value} if isinstance(value, str) else value
    allowed = {"name", "options"} | ({"weight", "schedule"} if weighted else set())
    if not isinstance(table, Mapping):
        problems.append(Problem(key, f"expected a name or a table, got {value!r}"))
        return below
    for extra in sorted(set(table) - allowed):
        problems.append(Problem(f"{key}.{extra}", f"unknown key{nearest(extra, allowed)}"))
    name = table.get("name", below.name if below else None)
    options = _table(f"{key}.options", table.get("options", {}), problems)
    if not isinstance(name, str) or not name:
        problems.append(Problem(f"{key}.name", "is missing" if name is None else f"expected a name, got {name!r}"))
        return below
    name, weight, schedule = parse_term(name) if weighted else (str(name), None, None)
    if "weight" in table:
        try:
            weight = read_value(float, table["weight"])
        except Unfit as error:
            problems.append(Problem(f"{key}.weight", str(error)))
    schedule = _schedule(f"{key}.schedule", table.get("schedule", schedule), problems)
    if weight is not None and not abs(weight) < float("inf"):
        problems.append(Problem(f"{key}.weight", f"expected a finite number, got {weight}"))
    if below is not None and below.name == name:
        options = {**below.options, **options}
    return Choice(str(name), options, 1.0 if weight is None else weight, schedule)


def _schedule(key: str, value: Any, problems: list[Problem]) -> str:
    """A term's schedule as text, `constant` where none is given or it has a mistake."""
    try:
        return str(TermSchedule.read("constant" if value is None else read_value(str, value)))
    except ValueError as error:  # Unfit is one
        problems.append(Problem(key, str(error)))
        return "constant"


def _stop_rules(value: Any) -> Any:
    rules = [value] if isinstance(value, str) else value
    for rule in rules if isinstance(rules, list | tuple) else ():
        if isinstance(rule, str):
            StopRule.read(rule)
    return rules


def _add_options(
    kind: str, choices: Sequence[Choice], options: Mapping[str, Any], problems: list[Problem]
) -> tuple[Choice, ...]:
    """Options of one of several: `key` belongs to the only one there is, `name.key` to the one named."""
    result = list(choices)
    for key, value in options.items():
        name, dot, option = key.rpartition(".")
        owners = [i for i, choice in enumerate(result) if not dot or choice.name == name]
        if len(owners) != 1:
            names = ", ".join(choice.name for choice in result)
            why = (
                f"say whose: one of {names}, as NAME.{option}"
                if owners
                else f"no {kind} {name!r} here; there is {names}"
            )
            problems.append(Problem(f"{kind}.options.{key}", why))
            continue
        owner = result[owners[0]]
        result[owners[0]] = dataclasses.replace(owner, options={**owner.options, option: value})
    return tuple(result)


def _table(key: str, value: Any, problems: list[Problem]) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    problems.append(Problem(key, f"expected a table, got {value!r}"))
    return {}
