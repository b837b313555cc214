"""`lora-forge run`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_forge.cli.answer import json_alone
from lora_forge.cli.registry import open_registry
from lora_forge.cli.run_options import as_layers, run_options
from lora_forge.config.run import collect_run_config, read_toml
from lora_forge.errors import ConfigError, PluginError, Problem
from lora_forge.like import Earlier, check_earlier, differences, read_earlier

if TYPE_CHECKING:
    from lora_forge.plan import Plan
    from lora_forge.plugins import Registry
    from lora_forge.session import Session

Answer = Callable[[object], None]  # prints an object as JSON


@click.command(name="run", short_help="Make a LoRA for one prompt.")
@run_options()
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
    layers += as_layers(given)
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
    from lora_forge.cli.collector import StartUp
    from lora_forge.cli.display import Progress, print_result, print_warnings

    with StartUp() as start_up, Progress(plan.iterations) as progress:
        registry.observe(start_up, "start_up")
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
