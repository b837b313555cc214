"""`lora-forge run`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import click

from lora_forge.cli.answer import json_alone
from lora_forge.cli.pairs import read_pair
from lora_forge.cli.registry import open_registry
from lora_forge.config.run import DEFAULT_ITERATIONS, DEFAULT_L2, RunConfig, collect_run_config, read_toml
from lora_forge.errors import ConfigError, PluginError, Problem
from lora_forge.like import Earlier, check_earlier, differences, read_earlier
from lora_forge.options import Text

if TYPE_CHECKING:
    from lora_forge.plan import Plan
    from lora_forge.plugins import Registry
    from lora_forge.session import Session

# The option's name, where it is not the key's own; the seed specification's spellings work too.
_SPELLINGS = {
    "model": ("--model", "--model_name"),
    "output": ("-o", "--output", "--output_path"),
    "plugins": ("--plugin",),
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
Answer = Callable[[object], None]  # prints an object as JSON


def _scalar_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """One option for each scalar key of a run config, with the key's own help."""
    hints = get_type_hints(RunConfig)
    for field in reversed(dataclasses.fields(RunConfig)):
        if "help" not in field.metadata:
            continue
        names = _SPELLINGS.get(field.name, ("--" + field.name.replace("_", "-"),))
        settings: dict[str, Any] = {"help": field.metadata["help"], "default": None}
        if field.name == "sidecar":
            names = ("--sidecar/--no-sidecar",)
            settings["help"] += f"  [default: {_DEFAULTS[field.name]}]"
        elif isinstance(field.default, bool):
            settings["is_flag"] = True
        elif field.name == "plugins":
            settings.update(multiple=True, metavar="FILE.py")
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


@click.command(name="run", short_help="Make a LoRA for one prompt.")
@_scalar_options
@click.option(
    "--loss",
    multiple=True,
    metavar="NAME[:WEIGHT]",
    help="a term of the objective; repeatable  [default: embedding_magnitude]",
)
@click.option(
    "--loss-opt",
    multiple=True,
    metavar="[NAME.]KEY=VALUE",
    help="an option of a loss, as `plugins show` lists them; repeatable",
)
@click.option("--initializer", metavar="NAME", help="the initializer  [default: gaussian]")
@click.option("--initializer-opt", multiple=True, metavar="KEY=VALUE", help="an option of it; repeatable")
@click.option("--optimizer", metavar="NAME", help="the optimizer  [default: adamw]")
@click.option("--optimizer-opt", multiple=True, metavar="KEY=VALUE", help="an option of it; repeatable")
@click.option("--saver", multiple=True, metavar="NAME", help="a format to write; repeatable  [default: safetensors]")
@click.option("--saver-opt", multiple=True, metavar="[NAME.]KEY=VALUE", help="an option of a saver; repeatable")
@click.option("--backend-opt", multiple=True, metavar="KEY=VALUE", help="an option of the model's backend; repeatable")
@click.option("--config", type=Path, metavar="RUN.toml", help="a run config file; the command line wins over it")
@click.option("--like", type=Path, metavar="FILE", help="repeat the run that made this file; all else wins over it")
@click.option("--dry-run", is_flag=True, help="print the resolved run and check it; read no weights, write nothing")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object on stdout, all else on stderr")
def command(config: Path | None, like: Path | None, dry_run: bool, as_json: bool, **given: Any) -> int:
    """Make a LoRA for one prompt.

    \b
    lora-forge run --prompt "a steampunk owl" --model tiny_sdxl -o owl.safetensors
    """
    earlier = read_earlier(like) if like else None
    layers: list[Mapping[str, Any]] = [read_toml(config)] if config else []
    layers += _structured(given)
    with json_alone(as_json) as answer:
        return _carry_out(earlier, layers, config.name if config else "", dry_run, answer if as_json else None)


def _carry_out(
    earlier: Earlier | None, layers: list[Mapping[str, Any]], source: str, dry_run: bool, answer: Answer | None
) -> int:
    run_config, mistakes = collect_run_config([*([earlier.layer_below(layers)] if earlier else []), *layers])
    try:
        registry = open_registry(run_config.plugins, strict=run_config.strict_plugins)
    except PluginError as error:
        raise ConfigError(source if mistakes else "", [*mistakes, Problem("plugins", str(error))]) from error

    if earlier:
        check_earlier(earlier, run_config, registry)

    from lora_forge.naming import default_output
    from lora_forge.plan import make_plan
    from lora_forge.saving import versions
    from lora_forge.session import Session

    plan = make_plan(run_config, registry, mistakes=mistakes, source=source)
    if run_config.output is None:
        output = str(default_output(run_config.prompt))
        plan = dataclasses.replace(plan, config=dataclasses.replace(run_config, output=output))
    if earlier:
        for difference in differences(earlier, plan.record(), plan.config, versions()):
            click.echo(f"lora-forge: not as {earlier.path.name}: {difference}", err=True)
    with Session(registry, {}) as session:
        return _dry_run(session, plan, answer) if dry_run else _run(session, registry, plan, answer)


def _run(session: Session, registry: Registry, plan: Plan, answer: Answer | None) -> int:
    from lora_forge.cli.display import Progress, print_result, print_warnings

    with Progress(plan.iterations) as progress:
        registry.observe(progress, "progress")
        result = session.run_plan(plan)
    print_warnings(result.warnings)
    if answer:
        answer(result.as_dict())
    else:
        print_result(result)
    return 0


def _dry_run(session: Session, plan: Plan, answer: Answer | None) -> int:
    from lora_forge.cli.display import print_plan
    from lora_forge.output import place_of

    model = session.check_plan(plan)
    files = [str(place) for place, _ in plan.files(place_of(plan.config.output or ""))]
    record = {
        **plan.record(),
        "output": files[0],
        "files": files,
        "device": model.device,
        "layers": {c: sum(layer.component == c for layer in model.layers) for c in plan.backend_spec.components},
        "loaded": list(plan.load),
    }
    if answer:
        answer(record)
    else:
        print_plan(record)
    return 0


def _structured(given: dict[str, Any]) -> list[dict[str, Any]]:
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
