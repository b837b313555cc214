"""The options of a run, of one prompt or of many: one for each key of a run config."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click

from lora_forge.cli.pairs import read_pair
from lora_forge.config.run import DEFAULT_ITERATIONS, DEFAULT_L2, RunConfig, read_toml
from lora_forge.errors import UsageError
from lora_forge.options import Text

# The option's name, where it is not the key's own; the seed specification's spellings work too.
_SPELLINGS = {
    "model": ("--model", "--model_name"),
    "output": ("-o", "--output", "--output_path"),
    "plugins": ("--plugin",),
    "paraphrases": ("--paraphrase",),
    "controls": ("--control",),
}
_DEFAULTS = {
    "base_model": "the model config's",
    "rank": "the model config's",
    "alpha": "the model config's",
    "iterations": f"the model config's, or {DEFAULT_ITERATIONS}",
    "l2": f"the model config's, or {DEFAULT_L2}",
    "output": "output/<the prompt's words>_lora.safetensors",
    "sidecar": "with the saver safetensors",
}


_REPEATABLE = {"plugins": "FILE.py", "stop_when": "RULE", "paraphrases": "TEXT", "controls": "TEXT"}


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def run_options(but: Collection[str] = ()) -> Decorator:
    """One option for each scalar key of a run config `but` some, with the key's own help; and the choice of plugins."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        function = _with(function, _plugin_choices())
        if "loss" not in but:
            function = _with(function, _losses())
        return _scalar_options(function, but)

    return decorate


def _losses() -> Sequence[Decorator]:
    return (
        click.option(
            "--loss",
            multiple=True,
            metavar="NAME[:WEIGHT][@SCHEDULE]",
            help="a term of the objective; repeatable  [default: embedding_magnitude]",
        ),
        click.option(
            "--loss-opt",
            multiple=True,
            metavar="[NAME.]KEY=VALUE",
            help="an option of a loss, as `plugins show` lists them; repeatable",
        ),
        click.option("--measure", multiple=True, metavar="NAME", help="a loss to evaluate, not to train; repeatable"),
        click.option("--measure-opt", multiple=True, metavar="[NAME.]KEY=VALUE", help="an option of one; repeatable"),
    )


def _plugin_choices() -> Sequence[Decorator]:
    return (
        click.option("--initializer", metavar="NAME", help="the initializer  [default: gaussian]"),
        click.option("--initializer-opt", multiple=True, metavar="KEY=VALUE", help="an option of it; repeatable"),
        click.option("--optimizer", metavar="NAME", help="the optimizer  [default: adamw]"),
        click.option("--optimizer-opt", multiple=True, metavar="KEY=VALUE", help="an option of it; repeatable"),
        click.option(
            "--saver", multiple=True, metavar="NAME", help="a format to write; repeatable  [default: safetensors]"
        ),
        click.option("--saver-opt", multiple=True, metavar="[NAME.]KEY=VALUE", help="an option of a saver; repeatable"),
        click.option(
            "--backend-opt", multiple=True, metavar="KEY=VALUE", help="an option of the model's backend; repeatable"
        ),
    )


def _with(function: Callable[..., Any], options: Sequence[Decorator]) -> Callable[..., Any]:
    for option in reversed(options):
        function = option(function)
    return function


def _scalar_options(function: Callable[..., Any], but: Collection[str]) -> Callable[..., Any]:
    hints = get_type_hints(RunConfig)
    for field in reversed(dataclasses.fields(RunConfig)):
        if "help" not in field.metadata or field.name in but:
            continue
        names = _SPELLINGS.get(field.name, ("--" + field.name.replace("_", "-"),))
        settings: dict[str, Any] = {"help": field.metadata["help"], "default": None}
        if field.name == "sidecar":
            names = ("--sidecar/--no-sidecar",)
            settings["help"] += f"  [default: {_DEFAULTS[field.name]}]"
        elif isinstance(field.default, bool):
            settings["is_flag"] = True
        elif field.name in _REPEATABLE:
            settings.update(multiple=True, metavar=_REPEATABLE[field.name])
        else:
            settings["metavar"] = _metavar(hints[field.name])
            default = _DEFAULTS.get(field.name, field.default)
            if default not in (None, ""):
                settings["help"] += f"  [default: {default}]"
        function = click.option(*names, field.name, **settings)(function)
    return function


def _metavar(hint: Any) -> str:
    arms = [arm for arm in get_args(hint) if arm is not type(None)]
    if get_origin(hint) is Literal:
        return "|".join(arms)
    return {int: "N", float: "X", Path: "FILE"}.get(arms[0] if arms else hint, "TEXT")


def as_layers(given: dict[str, Any]) -> list[dict[str, Any]]:
    """The command line as run config layers: names first, then options that add to them."""
    names: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for key, value in given.items():
        if value is None or (value is False and key != "sidecar") or value == ():
            continue
        if key.endswith("_opt"):
            kind = key.removesuffix("_opt")
            pairs = dict(read_pair(text, f"--{kind}-opt") for text in value)
            options["backend_options" if kind == "backend" else kind] = (
                pairs if kind == "backend" else {"options": pairs}
            )
        elif isinstance(value, tuple):
            names[key] = [Text(item) for item in value]
        else:
            names[key] = value if isinstance(value, bool) else Text(value)
    return [names, options]


def shared_layers(path: Path | None, but: Collection[str], why: str, given: dict[str, Any]) -> list[dict[str, Any]]:
    """The layers of many runs' config: the file's, if there is one, and what is given beside it.

    Raises UsageError for keys of the file that the runs do not share, `but`, saying `why`.
    """
    if path is None:
        return as_layers(given)
    config = read_toml(path)
    if own := [key for key in but if key in config]:
        raise UsageError(f"{path.name}: {', '.join(own)}: {why}")
    return [config, *as_layers(given)]
