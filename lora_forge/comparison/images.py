"""Pictures for a comparison: for some prompts, without and with each objective's LoRA, from the same noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_forge.comparison.compare import Comparison, shared_plan
from lora_forge.comparison.gathering import picture_of
from lora_forge.comparison.results import NAME, Results, Row, write_results
from lora_forge.effect.control_prompts import CONTROL_PROMPTS
from lora_forge.errors import LoraForgeError, ModelError, UsageError, blaming
from lora_forge.output import appearing, place_of
from lora_forge.plan import Plan
from lora_forge.plugins import Registry

if TYPE_CHECKING:
    from lora_forge.model import LoadedModel

PROMPTS = 3  # of which there are pictures


def draw_images(
    asked: Comparison, results: Results, registry: Registry, each: Callable[[int], None]
) -> tuple[Results, list[str]]:
    """Draw what is missing, and write the results with the pictures named in them; also what could not be drawn.

    Of the first prompts, with the first seed. each: called before every picture with how many there will be.
    Raises UsageError as `folder_of_images`, and whatever opening the model raises.
    """
    folder = folder_of_images(asked.output_dir)
    rows = list(_shown(results))
    missing = [row for row in rows if row.measured and not row.measured.image]
    drawn, notes = _draw(asked, missing, folder, registry, each) if missing else ([], [])
    results = replace(results, rows=tuple(_with_image(row) if row in drawn else row for row in results.rows))
    write_results(folder / NAME, results)
    return results, notes


def folder_of_images(output_dir: str) -> Path:
    """Raises UsageError where that is not on this machine."""
    folder = place_of(output_dir)
    if not isinstance(folder, Path):
        raise UsageError(f"pictures are drawn of files on this machine, not of {output_dir!r}")
    return folder


def _shown(results: Results) -> Iterator[Row]:
    prompts = list(dict.fromkeys(row.prompt for row in results.rows))[:PROMPTS]
    for row in results.rows:
        if row.measured and row.measured.file and row.prompt in prompts and row.seed == results.header.seeds[0]:
            yield row


def _with_image(row: Row) -> Row:
    assert row.measured is not None
    return replace(row, measured=replace(row.measured, image=picture_of(row.measured.file or "")))


def _draw(
    asked: Comparison, rows: Sequence[Row], folder: Path, registry: Registry, each: Callable[[int], None]
) -> tuple[list[Row], list[str]]:
    """The rows of which there are pictures now, and why there are none of others."""
    from lora_forge.model import open_model
    from lora_forge.preview.placement import place

    plan = shared_plan(asked, registry)
    model = open_model(plan)
    with blaming(f"backend {plan.backend.name!r}"):
        model.backend.check_files(plan.backend_spec.components)
        try:
            pipeline = model.backend.pipeline()
        except NotImplementedError as error:
            raise ModelError(f"backend {plan.backend.name!r} makes no images: it has no pipeline()") from error
        place(pipeline, model.device, None)
    controls = (*asked.controls, *CONTROL_PROMPTS)
    drawn, notes = [], []
    for row in rows:
        each(len(rows))
        try:
            _draw_one(plan, model, pipeline, row, next(one for one in controls if one != row.prompt), folder)
            drawn.append(row)
        except LoraForgeError as error:  # of one LoRA; the numbers are worth more than its picture
            notes.append(f"no picture of {row.objective!r} for {row.prompt!r}: {error}")
    return drawn, notes


def _draw_one(plan: Plan, model: LoadedModel, pipeline: Any, row: Row, control: str, folder: Path) -> None:
    from lora_forge.effect.of_file import Prompt
    from lora_forge.files.lora_file import open_lora
    from lora_forge.preview.adapter import adapter_tensors
    from lora_forge.preview.file_layers import read_model_layers
    from lora_forge.preview.grid import grid
    from lora_forge.preview.render import render_preview

    assert row.measured is not None
    lora = open_lora(folder / (row.measured.file or ""))
    tensors = adapter_tensors(read_model_layers(lora, plan.backend_spec, model.backend.architecture()))
    prompts = (Prompt("training", row.prompt), Prompt("control", control))
    preview = render_preview(pipeline, tensors, prompts, strengths=(1.0,), seeds=(row.seed,))
    with appearing(folder / picture_of(row.measured.file or ""), overwrite=True) as temporary:
        grid(preview).save(temporary, "PNG")
