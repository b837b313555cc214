"""`lora-forge preview FILE`: images without and with a LoRA, from the same noise, in one labelled picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_forge.cli.answer import json_alone
from lora_forge.cli.on_model import check_text, checked_config, model_options, progress, training_prompt
from lora_forge.cli.registry import open_registry
from lora_forge.errors import ModelError, OutputError, UsageError, blaming, printable

if TYPE_CHECKING:
    from lora_forge.config.run import RunConfig
    from lora_forge.contracts import Backend
    from lora_forge.effect.base_model import FileBase
    from lora_forge.effect.of_file import Prompt
    from lora_forge.files.lora_file import LoraFile
    from lora_forge.preview.render import Preview

DRAWN = 2  # control prompts, where none is given
_MOST = {"strengths": 8, "seeds": 16, "images": 256}
_MOST_SIDE = 4096


Callback = Callable[[click.Context, click.Parameter, Any], Any]


def _numbers(kind: type[int] | type[float], what: str) -> Callback:
    """Reads numbers with commas between, each counted once."""

    def read(ctx: click.Context, parameter: click.Parameter, value: str) -> tuple[int | float, ...]:
        numbers = []
        for text in (one.strip() for one in value.split(",")):
            try:
                number = kind(text)
            except ValueError as error:
                raise click.BadParameter(f"{text!r} is no number; give {what} with commas between") from error
            if not math.isfinite(number) or (kind is int and not 0 <= number < 2**63):
                raise click.BadParameter(f"{text!r} is out of range")
            numbers.append(number)
        chosen = tuple(dict.fromkeys(numbers))
        if len(chosen) > _MOST[what]:
            raise click.BadParameter(f"{len(chosen)} {what} are more than {_MOST[what]}")
        return chosen

    return read


def _size(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """Reads `512`, or `768x512`: width and height in pixels."""
    if value is None:
        return None
    sides = value.lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() and len(side) < 6 for side in sides):
        raise click.BadParameter(f"{value!r} is no size; give 512, or 768x512")
    width, height = int(sides[0]), int(sides[-1])
    for side in (width, height):
        if side % 8 or not 8 <= side <= _MOST_SIDE:
            raise click.BadParameter(f"{side} is no multiple of 8 up to {_MOST_SIDE}")
    return width, height


@click.command(name="preview")
@click.argument("file", metavar="FILE", type=Path)
@click.option("--prompt", default=None, help="the training prompt  [default: the one in the file's own record]")
@click.option("--prompt-2", default=None, help="what the second text encoder read instead of it")
@click.option("--control", multiple=True, metavar="TEXT", help="a prompt that has nothing to do with it; repeatable")
@click.option("--no-controls", is_flag=True, help=f"no control prompts, instead of {DRAWN} drawn where none is given")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="of the drawing of controls")
@click.option(
    "--strengths",
    callback=_numbers(float, "strengths"),
    default="0,0.5,1",
    show_default=True,
    metavar="S,…",
    help="of the LoRA, a column each; 0, the base model, is always there",
)
@click.option(
    "--seeds",
    callback=_numbers(int, "seeds"),
    default="0",
    show_default=True,
    metavar="N,…",
    help="of the noise that images are made from, a row each for every prompt",
)
@click.option("--steps", type=click.IntRange(1, 1000), default=20, show_default=True, help="of each image")
@click.option("--guidance", type=float, default=None, help="guidance scale  [default: the pipeline's own]")
@click.option(
    "--size", callback=_size, default=None, metavar="N|WxH", help="of each image, in pixels  [default: the model's own]"
)
@click.option(
    "-o", "--output", type=Path, default=None, metavar="PNG", help="the picture  [default: <stem>.grid.png beside FILE]"
)
@click.option("--overwrite", is_flag=True, help="replace the picture if it exists")
@model_options
@click.option("--json", "as_json", is_flag=True, help="print one JSON object on stdout, all else on stderr")
def command(file: Path, output: Path | None, overwrite: bool, as_json: bool, **given: Any) -> None:
    """Make images without and with a LoRA, for its own prompt and for others, and say how far they differ.

    \b
    lora-forge preview owl.safetensors --control "a bowl of cherries"
    """
    from lora_forge.output import appearing, check_apart, check_output

    output = _named(file, output)
    check_apart([file], output)
    check_output(output, overwrite=overwrite)
    with json_alone(as_json) as answer:
        preview, report = _preview(file, given)
        from lora_forge.preview.grid import grid

        picture = grid(preview)
        with appearing(output, overwrite=overwrite) as temporary:
            picture.save(temporary, "PNG")
        report["output"] = str(output)
        if as_json:
            answer(report)
            return
    from lora_forge.cli.preview_tables import print_preview

    print_preview(report)
    click.echo(f"picture: {printable(str(output))}")


def _named(file: Path, output: Path | None) -> Path:
    if output is None and not file.name:
        raise UsageError(f"{str(file)!r} names no file")
    if output is None:
        return file.with_name(f"{file.name if file.is_dir() else file.stem}.grid.png")
    if output.suffix.lower() != ".png":
        raise OutputError(f"output {str(output)!r} is no name of a PNG; let it end in .png")
    return output


def _preview(file: Path, given: dict[str, Any]) -> tuple[Preview, dict[str, Any]]:
    """The images, and all else of the answer, JSON-ready."""
    config = _checked(given)
    from lora_forge.effect.base_model import base_of, recorded_run, split_layers
    from lora_forge.files.lora_file import open_lora

    registry = open_registry(config.plugins, strict=config.strict_plugins)
    lora = open_lora(file)
    base = base_of(
        lora, registry, model=given["model"], base_model=config.base_model, backend_options=config.backend_options
    )
    split_layers(lora, base.spec)  # raises where the file is none of this family
    prompts = _prompts(file, recorded_run(lora), given)
    preview, notes = _rendered(lora, base, prompts, config, given)
    return preview, {
        "file": str(file),
        "base_model": base.base_model,
        "backend": base.backend.name,
        **preview.as_dict(),
        "notes": [*notes, *_unmoved(preview)],
    }


def _checked(given: dict[str, Any]) -> RunConfig:
    """The options, as far as they can be checked before anything is read."""
    if given["control"] and given["no_controls"]:
        raise UsageError("--control gives a control prompt, and --no-controls wants none; give one of them")
    if given["guidance"] is not None and not math.isfinite(given["guidance"]):
        raise UsageError(f"--guidance: {given['guidance']} is no guidance scale")
    if set(given["strengths"]) == {0.0}:
        raise UsageError("--strengths: all of them are 0, where there is nothing of the LoRA to see")
    check_text("training", given["prompt"], given["prompt_2"])
    check_text("control", *given["control"])
    controls = 0 if given["no_controls"] else len(set(given["control"])) or DRAWN
    number = len({0.0, *given["strengths"]}) * len(given["seeds"]) * (1 + controls)
    if number > _MOST["images"]:
        raise UsageError(f"{number} images are more than {_MOST['images']}; give fewer prompts, seeds or strengths")
    return checked_config(given)


def _prompts(file: Path, run: Mapping[str, Any], given: dict[str, Any]) -> list[Prompt]:
    """The training prompt first, then the control prompts."""
    from lora_forge.effect.control_prompts import CONTROL_PROMPTS, drawn
    from lora_forge.effect.of_file import Prompt

    training = training_prompt(file, run, given["prompt"], given["prompt_2"])
    check_text("training", training.text, training.text_2)
    controls: Sequence[str] = given["control"]
    if not controls and not given["no_controls"]:
        controls = drawn([one for one in CONTROL_PROMPTS if one != training.text], DRAWN, given["seed"])
    return [training, *(Prompt("control", one) for one in dict.fromkeys(controls))]


def _rendered(
    lora: LoraFile, base: FileBase, prompts: Sequence[Prompt], config: RunConfig, given: dict[str, Any]
) -> tuple[Preview, list[str]]:
    from lora_forge.model import resolve_device
    from lora_forge.preview.adapter import adapter_tensors
    from lora_forge.preview.file_layers import read_model_layers
    from lora_forge.preview.placement import place
    from lora_forge.preview.render import render_preview

    device = resolve_device(config.device)
    backend = base.open(device, config.dtype)
    with progress("drawing") as each, blaming(f"backend {base.backend.name!r}"):
        backend.check_files(base.spec.components)
        layers = read_model_layers(lora, base.spec, backend.architecture())
        notes = list(_cut(backend, base.spec.encoders, prompts))
        tensors = adapter_tensors(layers)
        try:
            pipeline = backend.pipeline()
        except NotImplementedError as error:
            raise ModelError(f"backend {base.backend.name!r} makes no images: it has no pipeline()") from error
        place(pipeline, device, given["size"])
        preview = render_preview(
            pipeline,
            tensors,
            prompts,
            strengths=given["strengths"],
            seeds=given["seeds"],
            steps=given["steps"],
            guidance=given["guidance"],
            size=given["size"],
            each=each,
        )
    return preview, notes


def _cut(backend: Backend, encoders: Sequence[str], prompts: Sequence[Prompt]) -> Iterator[str]:
    """What the model does not read of a prompt, in words."""
    for prompt in prompts:
        cut: dict[str, None] = {}
        for index, encoder in enumerate(encoders):
            text = prompt.text if prompt.text_2 is None or not index else prompt.text_2
            cut |= {one: None for one in backend.tokenize(encoder, [text]).cut if one}
        for text in cut:
            yield f"the {prompt.role} prompt is longer than the model reads; this is cut off: {text!r}"


def _unmoved(preview: Preview) -> Iterator[str]:
    if not any(one.difference for one in preview.pictures):
        yield "the LoRA changes no pixel of any image"
