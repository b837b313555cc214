"""`lora-forge effect FILE`: without an image, what a LoRA file does to what the denoiser is conditioned on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_forge.cli.answer import json_alone
from lora_forge.cli.on_model import check_text, checked_config, model_options, progress, training_prompt
from lora_forge.cli.prompt_file import prompt_file
from lora_forge.cli.registry import open_registry
from lora_forge.errors import UsageError, printable

if TYPE_CHECKING:
    from lora_forge.config.run import RunConfig
    from lora_forge.effect.base_model import FileBase
    from lora_forge.effect.of_file import FileEffect, Prompt
    from lora_forge.files.lora_file import LoraFile

DRAWN = 16  # control prompts, unless --random says another number


@click.command(name="effect")
@click.argument("file", metavar="FILE", type=Path)
@click.option("--prompt", default=None, help="the training prompt  [default: the one in the file's own record]")
@click.option("--prompt-2", default=None, help="what the second text encoder read instead of it")
@click.option("--paraphrase", multiple=True, metavar="TEXT", help="the same in other words; repeatable")
@click.option("--control", multiple=True, metavar="TEXT", help="a prompt that has nothing to do with it; repeatable")
@click.option(
    "--random",
    "drawn",
    type=click.IntRange(min=0),
    default=None,
    metavar="N",
    help=f"control prompts to draw  [default: {DRAWN}]",
)
@click.option(
    "--controls-file",
    type=Path,
    default=None,
    metavar="FILE.txt",
    help="draw from these, one a line, instead of those that ship",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="of the drawing")
@click.option("--leave-one-out", is_flag=True, help="measure too what is left without each layer")
@click.option("--skip-layers", is_flag=True, help="do not measure layer by layer, which takes longest")
@click.option("--layers", "every_layer", is_flag=True, help="list every layer")
@model_options
@click.option("--json", "as_json", is_flag=True, help="print one JSON object on stdout, all else on stderr")
@click.option(
    "--html", "page", type=Path, default=None, metavar="PAGE", help="write a page with charts and a table too"
)
@click.option("--overwrite", is_flag=True, help="replace the page if it exists")
def command(file: Path, as_json: bool, every_layer: bool, page: Path | None, overwrite: bool, **given: Any) -> None:
    """Say how far a LoRA file moves what the denoiser is conditioned on, and whether it moves more than its prompt.

    \b
    lora-forge effect owl.safetensors --control "a bowl of cherries"
    """
    if page is not None:
        from lora_forge.output import check_apart, check_output

        check_apart([file], page)  # --overwrite replaces a page, never the LoRA it is about
        check_output(page, overwrite=overwrite)
    with json_alone(as_json) as answer:
        report = _measure(file, **given)
        if page is not None:
            from lora_forge.pages.effect_page import effect_page
            from lora_forge.pages.page import write_page

            write_page(page, effect_page(report), overwrite=overwrite)
        if as_json:
            answer(report)
            return
    from lora_forge.cli.effect_tables import print_effect

    print_effect(report, every_layer=every_layer)
    if page is not None:
        click.echo(f"page: {printable(str(page))}")


def _measure(file: Path, **given: Any) -> dict[str, Any]:
    """The whole answer, JSON-ready."""
    from lora_forge.effect.base_model import base_of, recorded_run, split_layers
    from lora_forge.files.lora_file import open_lora

    config = _checked(given)
    registry = open_registry(config.plugins, strict=config.strict_plugins)
    lora = open_lora(file)
    base = base_of(
        lora, registry, model=given["model"], base_model=config.base_model, backend_options=config.backend_options
    )
    maybe, left_out = split_layers(lora, base.spec)
    prompts: Sequence[Prompt] = ()
    if maybe:
        prompts = _prompts(file, recorded_run(lora), given)
    effect, others = _effect(lora, base, maybe, prompts, config, given)
    left_out = {name: left_out.get(name, 0) + others.get(name, 0) for name in {**left_out, **others}}
    return {
        "file": str(file),
        "base_model": base.base_model,
        "backend": base.backend.name,
        "left_out": left_out,
        **effect.as_dict(),
        "notes": [*_notes(effect, left_out, base), *effect.notes],
    }


def _effect(
    lora: LoraFile, base: FileBase, maybe: Sequence[Any], prompts: Sequence[Prompt], config: RunConfig, given: Any
) -> tuple[FileEffect, dict[str, int]]:
    from lora_forge.effect.of_file import NOTHING_TO_MEASURE, measure_file_effect

    if not maybe:
        return NOTHING_TO_MEASURE, {}
    import torch

    from lora_forge.effect.base_model import read_encoder_layers
    from lora_forge.errors import blaming
    from lora_forge.model import resolve_device

    device = resolve_device(config.device)
    backend = base.open(device, config.dtype)
    layers, others = read_encoder_layers(lora, maybe, base, backend.architecture())
    if not layers:
        return NOTHING_TO_MEASURE, others
    with progress("measuring") as each, blaming(f"backend {base.backend.name!r}"):
        effect = measure_file_effect(
            backend,
            layers,
            prompts,
            device=device,
            encoders=base.spec.encoders,
            rounding=torch.finfo(getattr(torch, config.dtype)).eps,
            per_layer=not given["skip_layers"],
            leave_one_out=given["leave_one_out"],
            each=each,
        )
    return effect, others


def _checked(given: dict[str, Any]) -> RunConfig:
    """The options that a run has too, checked as a run's are."""
    if given["skip_layers"] and given["leave_one_out"]:
        raise UsageError("--leave-one-out measures layer by layer, and --skip-layers does not; give one of them")
    return checked_config(given)


def _prompts(file: Path, run: Any, given: dict[str, Any]) -> list[Prompt]:
    """The training prompt first, then paraphrases, control prompts and the empty prompt."""
    from lora_forge.effect.of_file import Prompt

    training, same = training_prompt(file, run, given["prompt"], given["prompt_2"]), given["paraphrase"]
    controls = [*given["control"], *_drawn(given, but={training.text, *same, *given["control"]})]
    prompts = [
        training,
        *(Prompt("paraphrase", one) for one in same),
        *(Prompt("control", one) for one in dict.fromkeys(controls)),
    ]
    for one in prompts:
        check_text(one.role, one.text, one.text_2)
    return [*prompts, Prompt("empty", "")]


def _drawn(given: dict[str, Any], *, but: set[str]) -> list[str]:
    """Control prompts drawn without replacement; the same for the same seed and list."""
    from lora_forge.effect.control_prompts import CONTROL_PROMPTS, drawn

    path, number = given["controls_file"], given["drawn"]
    pool = [one for one in (prompt_file("--controls-file", path) if path else CONTROL_PROMPTS) if one not in but]
    if number is not None and number > len(pool):
        source = repr(str(path)) if path else "the list that ships"
        raise UsageError(f"--random: {number} control prompts were asked for, {source} has {len(pool)}")
    return drawn(pool, DRAWN if number is None else number, given["seed"])


def _notes(effect: FileEffect, left_out: dict[str, int], base: FileBase) -> Iterator[str]:
    counts = " and ".join(f"{count} layers of {component}" for component, count in left_out.items())
    if not effect.prompts:
        yield f"no layers of a text encoder, only {counts}: it moves nothing of what the denoiser is conditioned on"
        return
    if left_out:
        yield f"{counts} are left out: they act within the denoiser, and cannot move what it is conditioned on"
    unused = [encoder for encoder in base.spec.encoders if encoder not in effect.encoders]
    if unused:
        yield f"{', '.join(unused)}: no layers in the file, so it is not run, and what it makes is in no number here"
    if all(not shift.relative for one in effect.prompts for shift in one.shifts):
        yield "its text-encoder layers move nothing at all"
