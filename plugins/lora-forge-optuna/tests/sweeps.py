"""Sweeps for the tests: the command, in this process, and what it left in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_forge_optuna.cli import main

PROMPTS = ("a steampunk owl", "a brass fox")
TOYS = Path(__file__).parent / "toy_losses.py"
WITH_TOYS = ("--set", f"plugins={json.dumps([str(TOYS)])}")


def sweep(folder: Path, *arguments: str, metric: str = "loss", prompts: tuple[str, ...] = PROMPTS[:1]) -> int:
    """Its exit code. Of two steps on tiny_sdxl, unless said otherwise."""
    texts = [word for prompt in prompts for word in ("--prompt", prompt)]
    model = () if "--model" in arguments else ("--model", "tiny_sdxl")
    steps = () if any("iterations=" in one for one in arguments) else ("--set", "iterations=2")
    return main([*texts, *model, *steps, *arguments, "--metric", metric, "--output-dir", str(folder)])


def lines(folder: Path) -> list[dict[str, Any]]:
    """The trials in `sweep.jsonl`."""
    return [json.loads(line) for line in (folder / "sweep.jsonl").read_text(encoding="utf-8").splitlines()]


def complete(folder: Path) -> list[dict[str, Any]]:
    return [line for line in lines(folder) if line["state"] == "complete"]
