"""`lora-forge models list`, `models show NAME`, `models new NAME`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click

from lora_forge.cli.plugins.options import plugin_files
from lora_forge.config.model import ModelConfig, read_model_config, shipped_names


@click.group(name="models")
def command() -> None:
    """List, show and make model configs."""


@command.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def list_models(as_json: bool) -> None:
    """List the model configs that ship with the package."""
    rows = [_summary(read_model_config(name)) for name in shipped_names()]
    if as_json:
        click.echo(json.dumps(rows))
        return
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(
        Column("name", no_wrap=True), "backend", Column("base model", overflow="fold"), "rank", "alpha", "target layers"
    )
    for row in rows:
        layers = ", ".join(f"{component} {count}" for component, count in row["target_layers"].items())
        table.add_row(row["name"], row["backend"], row["base_model"], str(row["rank"]), f"{row['alpha']:g}", layers)
    Console().print(table)


@command.command(name="show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def show_model(name: str, as_json: bool) -> None:
    """Show a model config, by name or path: its numbers, and every target layer."""
    config = read_model_config(name)
    record = _summary(config) | {
        "iterations": config.iterations,
        "learning_rate": config.learning_rate,
        "regularization_strength": config.regularization_strength,
        "sha256": config.digest,
    }
    if as_json:
        targets = {component: list(layers) for component, layers in config.targets.items()}
        click.echo(json.dumps(record | {"target_layers": targets}))
        return
    for key, value in record.items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        click.echo(f"{key}: {'' if shown is None else shown}")
    for component, layers in config.targets.items():
        click.echo(f"\n{component}:")
        for layer in layers:
            size = config.dimensions.get(component, {}).get(layer)
            click.echo(f"  {layer}" + (f"  {list(size)}" if size else ""))


@command.command(name="new")
@click.argument("name")
@click.option("--base-model", required=True, metavar="BASE", help="Hub id, diffusers folder or .safetensors checkpoint")
@click.option(
    "--targets",
    multiple=True,
    default=("attention",),
    show_default=True,
    metavar="attention|attention+mlp|all|PATTERN",
    help="which layers get a LoRA; a pattern is matched against canonical paths, as in '*attn2.to_k'; repeatable",
)
@click.option("--rank", type=click.IntRange(min=1), default=8, show_default=True, help="LoRA rank")
@click.option("--alpha", type=float, default=None, help="LoRA alpha  [default: the rank]")
@click.option("--backend", default=None, help="the backend that knows the model  [default: the one that recognizes it]")
@plugin_files
@click.option("-o", "--output", type=Path, default=None, help="file to write  [default: NAME_config.json]")
@click.option("--overwrite", is_flag=True, help="replace the file if it exists")
def new_model(
    name: str,
    base_model: str,
    targets: tuple[str, ...],
    rank: int,
    alpha: float | None,
    backend: str | None,
    files: tuple[Path, ...],
    output: Path | None,
    overwrite: bool,
) -> None:
    """Derive a model config from a model's architecture, dimensions and all, without reading its weights."""
    from lora_forge.cli.registry import open_registry
    from lora_forge.derive import derive_model_config
    from lora_forge.output import check_output

    path = output or Path(f"{name}_config.json")
    check_output(path, overwrite=overwrite)
    alpha = rank if alpha is None else alpha
    data = derive_model_config(base_model, targets, open_registry(files), backend=backend, rank=rank, alpha=alpha)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", json.dumps(data, indent=1))
    path.write_text(text + "\n", encoding="utf-8")
    counts = {c: len(layers) for c, layers in data.items() if c.startswith("target_layers_")}
    click.echo(f"{path}: " + ", ".join(f"{c.removeprefix('target_layers_')} {n} layers" for c, n in counts.items()))


def _summary(config: ModelConfig) -> dict[str, Any]:
    return {
        "name": config.name,
        "backend": config.backend,
        "base_model": config.base_model,
        "rank": config.lora_rank,
        "alpha": config.lora_alpha,
        "target_layers": {component: len(layers) for component, layers in config.targets.items()},
    }
