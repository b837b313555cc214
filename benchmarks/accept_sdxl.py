"""Forge a LoRA, render before and after with diffusers, and write the report that claims about images rest on.

python benchmarks/accept_sdxl.py                                   # the real SDXL: Hub access and a GPU
python benchmarks/accept_sdxl.py --model tiny_sdxl --device cpu    # the same steps anywhere; pictures of noise

Writes lora.safetensors, grid.png and report.html (self-contained) into the output folder. Every pair of
pictures has one prompt, one seed and one set of starting noise; only the LoRA differs.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import lora_forge
from lora_forge import RunResult
from lora_forge.builtin.sdxl.family import SDXL
from lora_forge.clip_unet.tiny import tiny_folder
from lora_forge.config.model import read_model_config

Picture = Image.Image
MARGIN = 40


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompt", default="a vibrant oil painting of a steampunk owl")
    parser.add_argument("--control", default="a white mug on a wooden table", help="an unrelated prompt")
    parser.add_argument("--model", default="sdxl_base", help="model config")
    parser.add_argument("--base-model", help="Hub id, folder or .safetensors of a fine-tune")
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--target-shift", type=float, help="as in lora-forge run")
    parser.add_argument("--seed", type=int, default=0, help="of the LoRA and of the pictures")
    parser.add_argument("--steps", type=int, default=30, help="denoising steps of each picture")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=Path("output/acceptance"), help="folder to write into")
    return parser.parse_args(arguments)


def forge(given: argparse.Namespace) -> RunResult:
    return lora_forge.run(
        given.prompt,
        given.model,
        base_model=given.base_model,
        iterations=given.iterations,
        target_shift=given.target_shift,
        seed=given.seed,
        device=given.device,
        output=given.output / "lora.safetensors",
        overwrite=True,
    )


def open_pipeline(given: argparse.Namespace) -> Any:
    source = given.base_model or read_model_config(given.model).base_model or SDXL.tiny.name
    source = str(tiny_folder(SDXL)) if source == SDXL.tiny.name else source
    kind = diffusers.StableDiffusionXLPipeline
    load = kind.from_single_file if source.endswith(".safetensors") else kind.from_pretrained
    pipe = load(source, dtype=torch.float32 if given.device == "cpu" else torch.float16).to(given.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def render(pipe: Any, given: argparse.Namespace) -> list[Picture]:
    """One picture of the prompt and one of the control, from the same noise."""
    return [
        pipe(prompt, num_inference_steps=given.steps, generator=torch.Generator("cpu").manual_seed(given.seed)).images[
            0
        ]
        for prompt in (given.prompt, given.control)
    ]


def difference(one: Picture, other: Picture) -> float:
    """Mean absolute difference of two pictures, 0 to 255."""
    return float(np.abs(np.asarray(one, dtype=float) - np.asarray(other, dtype=float)).mean())


def grid(given: argparse.Namespace, before: list[Picture], after: list[Picture]) -> Picture:
    """Two rows (prompt, control), two columns (before, after), labelled."""
    side = max(before[0].width, 256)
    sheet = Image.new("RGB", (2 * side + 3 * MARGIN, 2 * (side + 2 * MARGIN) + MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=18)
    for row, label in enumerate((given.prompt, given.control)):
        top = MARGIN + row * (side + 2 * MARGIN)
        for column, (state, pictures) in enumerate((("before", before), ("after", after))):
            left = MARGIN + column * (side + MARGIN)
            draw.text((left, top - 4), f"{state}: {label}"[: side // 9], fill="black", font=font)
            sheet.paste(pictures[row].resize((side, side)), (left, top + MARGIN // 2))
    return sheet


def report(given: argparse.Namespace, result: RunResult, pixels: dict[str, float], sheet: Picture) -> str:
    """One HTML page with the picture, the numbers and the run in it; it loads nothing."""
    stored = io.BytesIO()
    sheet.save(stored, "PNG")
    rows = {"loss before": result.loss_before, "loss after": result.loss_after, "scaled by": result.strength}
    rows |= {
        f"‖ΔW‖ of {c.component} ({c.layers} layers, {c.inert} inert)": c.delta_norm for c in result.effect.components
    }
    rows |= {f"relative shift of {shift.name}": shift.relative for shift in result.effect.shifts}
    rows |= {f"cosine of {shift.name}": shift.cosine for shift in result.effect.shifts}
    rows |= {f"mean pixel difference (of 255), {name}": value for name, value in pixels.items()}
    table = "".join(f"<tr><td>{html.escape(name)}</td><td>{value:.6g}</td></tr>\n" for name, value in rows.items())
    record = json.dumps(json.loads(result.metadata["lora_forge"]), indent=1, ensure_ascii=False)
    return (
        '<!doctype html><meta charset="utf-8"><title>lora-forge: before and after</title>\n'
        "<style>body{font:16px sans-serif;margin:2em}td{padding:.2em 1em .2em 0}img{max-width:100%}</style>\n"
        f"<h1>{html.escape(given.prompt)}</h1>\n"
        f"<p>{html.escape(given.base_model or given.model)}, seed {given.seed}, {given.steps} denoising steps, "
        f"{html.escape(given.device)}</p>\n"
        f'<img alt="before and after" src="data:image/png;base64,{base64.b64encode(stored.getvalue()).decode()}">\n'
        f"<table>{table}</table>\n"
        + "".join(f"<p>{html.escape(warning)}</p>\n" for warning in result.warnings)
        + f"<details><summary>the run</summary><pre>{html.escape(record)}</pre></details>\n"
    )


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    result = forge(given)
    pipe = open_pipeline(given)
    before = render(pipe, given)
    pipe.load_lora_weights(str(result.path))
    after = render(pipe, given)
    pixels = {name: difference(before[i], after[i]) for i, name in enumerate(("prompt", "control"))}
    sheet = grid(given, before, after)
    sheet.save(given.output / "grid.png")
    (given.output / "report.html").write_text(report(given, result, pixels, sheet), encoding="utf-8")
    for name in ("lora.safetensors", "grid.png", "report.html"):
        print(given.output / name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
