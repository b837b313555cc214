"""The sides that are measured against each other: their commands, and what their output says of the steps.

`baseline`; `float32` and `bfloat16`, one `lora-forge run` each; `batch4`, `batch16-bfloat16`: one `lora-forge batch`
of so many prompts in one bank.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speed_process import Measured, measure, read_through

HERE = Path(__file__).parent
PROMPT = "a vibrant oil painting of a steampunk owl"
DTYPES = ("float32", "bfloat16", "float16")
_BATCH = re.compile(rf"batch(\d+)(?:-({'|'.join(DTYPES)}))?")


@dataclass(frozen=True)
class Settings:
    """What all sides have in common. threads: None leaves it to each process. device: as PyTorch names it."""

    model: str
    folder: Path
    iterations: int
    threads: int | None
    device: str = "cpu"


@dataclass(frozen=True)
class Side:
    """One side. kind: `baseline`, `run` or `batch`; prompts: how many LoRAs it makes."""

    name: str
    kind: str
    dtype: str
    prompts: int

    def command(self, settings: Settings, place: Path) -> list[str]:
        """The command line; what it writes goes into the folder `place`."""
        iterations = ["--iterations", str(settings.iterations)]
        if self.kind == "baseline":
            config = HERE.parent / "model_config" / f"{settings.model}_config.json"
            files = ["--model-folder", str(settings.folder), "--config", str(config), "--output", str(_file(place))]
            files += ["--prompt", PROMPT, "--device", settings.device]
            return [sys.executable, str(HERE / "speed_baseline.py"), *files, *iterations]
        model = ["--model", settings.model, "--base-model", str(settings.folder), "--device", settings.device]
        ours = [sys.executable, "-m", "lora_forge", self.kind, *model, "--dtype", self.dtype, *iterations]
        if self.kind == "run":
            return [*ours, "--prompt", PROMPT, "--output", str(_file(place)), "--json"]
        prompts = place / "prompts.txt"
        prompts.write_text("\n".join(batch_prompts(self.prompts)) + "\n", encoding="utf-8")
        threads = ["--threads", str(settings.threads)] if settings.threads else []
        ours += ["--batch-size", str(self.prompts), "--plugin", str(HERE / "speed_observer.py"), *threads]
        return [*ours, str(prompts), "--output-dir", str(place / "out")]

    def run(self, settings: Settings, place: Path) -> tuple[dict[str, Any], Path | None]:
        """One run, ready for JSON, and the file of the first prompt. What a failed one says is under `error`."""
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        command = self.command(settings, place)
        read_through(settings.folder)
        measured = measure(command, settings.threads, {"LORA_FORGE_SPEED_LOG": str(place / "log.jsonl")})
        record: dict[str, Any] = {
            "side": self.name,
            "command": command,
            "wall_s": measured.wall,
            "cpu_s": measured.cpu,
            "peak_bytes": measured.peak,
            "error": measured.error,
        }
        if measured.error:
            return record, None
        told, file = self._told(measured, place)
        seconds = told["seconds"]
        steps = seconds["steps"] / settings.iterations if settings.iterations else None
        return {**record, "seconds": seconds, "seconds_per_step": steps, "losses": told["losses"]}, file

    def _told(self, measured: Measured, place: Path) -> tuple[dict[str, Any], Path | None]:
        """What the process said of the first prompt: `seconds` by phase, `losses` of all steps; and its file."""
        if self.kind == "batch":
            lines = (place / "log.jsonl").read_text(encoding="utf-8").splitlines()
            said = next(line for line in map(json.loads, lines) if line["prompt"] == PROMPT)
            return said, Path(said["path"])
        said = json.loads(measured.stdout.strip().splitlines()[-1])
        if self.kind == "baseline":
            return said, None
        said["losses"] = [values["loss"] for values in (*said["steps"], said["after"])]
        return said, _file(place)


def read_sides(text: str) -> list[Side]:
    """Sides by name, separated by commas. Raises ValueError naming one that is unknown."""
    sides = []
    for name in (part.strip() for part in text.split(",") if part.strip()):
        batch = _BATCH.fullmatch(name)
        if batch and int(batch[1]):
            sides.append(Side(name, "batch", batch[2] or "float32", int(batch[1])))
        elif name == "baseline":
            sides.append(Side(name, "baseline", "float32", 1))
        elif name in DTYPES:
            sides.append(Side(name, "run", name, 1))
        else:
            raise ValueError(f"{name!r} is no side; known: baseline, {', '.join(DTYPES)}, batchN, batchN-DTYPE")
    return sides


def batch_prompts(count: int) -> list[str]:
    """The prompt of the single sides, then as many PartiPrompts as are needed."""
    with (HERE.parent / "tests" / "data" / "PartiPrompts.tsv").open(encoding="utf-8", newline="") as file:
        others = [row["Prompt"] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    return [PROMPT, *others][:count]


def _file(place: Path) -> Path:
    return place / "lora.safetensors"
