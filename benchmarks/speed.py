"""How fast LoRAs are made: against the specification read literally, and against what this machine can do.

python benchmarks/speed.py --model-folder DIR [--iterations 50] [--repeats 3] [--json out.json]
python benchmarks/speed.py --model-folder DIR --closeness            # how close the sides' files are to each other
python benchmarks/speed.py --model-folder DIR --growth 1,2,4,8,16,32  # time and memory by prompts in a bank

Prints tables, and writes every figure as JSON, after each process that ran. benchmarks/README.md says what is measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import speed_tables
from speed_closeness import compare_files, compare_losses
from speed_process import machine, measure, read_through
from speed_rates import Work, work_of
from speed_sides import HERE, PROMPT, Settings, Side, read_sides

ALL_SIDES = "baseline,float32,bfloat16,batch4,batch16,batch16-bfloat16"
CLOSE_SIDES = "float32,bfloat16,batch4"
MEASURES = ("wall_s", "cpu_s", "peak_bytes", "seconds_per_step")
Report = dict[str, Any]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model-folder", type=Path, required=True, help="SDXL as a diffusers folder")
    parser.add_argument("--model", default="sdxl_base", help="the model config that fits it, by name")
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=1, help="of each side; the sides take turns")
    parser.add_argument("--sides", help=f"[default: {ALL_SIDES}; with --closeness {CLOSE_SIDES}; with --growth none]")
    parser.add_argument("--growth", default="", help="numbers of prompts, such as 1,2,4,8,16,32")
    parser.add_argument("--growth-dtype", default="float32")
    parser.add_argument("--growth-iterations", type=int, default=3)
    parser.add_argument("--closeness", action="store_true", help="hold the sides' files against the single ones")
    parser.add_argument("--device", default="cpu", help="of all sides; rates are measured of a CPU alone")
    parser.add_argument("--threads", type=int, help="for matrix products [default: each process's own choice]")
    parser.add_argument("--rate-seconds", type=float, default=0.25, help="spent on each route of each product; 0: none")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    given = parser.parse_args(arguments)
    if given.sides is None:
        given.sides = CLOSE_SIDES if given.closeness else "" if given.growth else ALL_SIDES
    try:
        given.sides = read_sides(given.sides)
        given.growth = [int(size) for size in given.growth.split(",") if size]
    except ValueError as error:
        parser.error(str(error))
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write. Exit code 1 if a process failed."""
    given = parse(arguments)
    settings = Settings(given.model, given.model_folder, given.iterations, given.threads, given.device)
    work = work_of(given.model_folder)
    report: Report = {
        "machine": machine(given.threads),
        "settings": {"model": given.model, "iterations": given.iterations, "repeats": given.repeats, "prompt": PROMPT},
        "work": {"matrix_parameters": work.parameters, "tokens": work.tokens, "flops_per_step": work.flops},
    }
    if given.rate_seconds and given.device == "cpu":
        report["rates"] = measure_rates(given, settings)
        keep(report, given.json)
    with tempfile.TemporaryDirectory() as folder:
        files = run_sides(given, settings, Path(folder), report)
        if given.closeness:
            report["closeness"] = closeness(given.sides, files, report["runs"])
    if given.growth:
        report["growth"] = []
        for size in given.growth:
            report["growth"].append(grow(size, given, settings))
            print(f"{size} in a bank: {report['growth'][-1]['error'] or 'done'}", file=sys.stderr)
            keep(report, given.json)
    summarize(report, given, work)
    keep(report, given.json)
    print(speed_tables.render(report))
    return int(any(record["error"] for record in (*report["runs"], *report.get("growth", ()))))


def keep(report: Report, path: Path | None) -> None:
    if path:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measure_rates(given: argparse.Namespace, settings: Settings) -> Any:
    """The machine's own rates, for every dtype and number of prompts that will be measured."""
    growing = {(given.growth_dtype, size) for size in given.growth}
    cases = sorted({(side.dtype, side.prompts) for side in given.sides} | growing | {("float32", 1)})
    rates: dict[str, Any] = {"rates": {}, "products": []}
    for dtype in dict.fromkeys(dtype for dtype, _ in cases):
        sizes = ",".join(str(size) for own, size in cases if own == dtype)
        command = [sys.executable, str(HERE / "speed_rates.py"), "--model-folder", str(settings.folder)]
        command += ["--prompts", sizes, "--dtypes", dtype, "--seconds", str(given.rate_seconds)]
        measured = measure(command, settings.threads)
        if measured.error:
            raise SystemExit(f"the machine's rates could not be measured: {measured.error}")
        said = json.loads(measured.stdout)
        rates["threads"] = said["threads"]
        rates["rates"] |= said["rates"]
        rates["products"] += said["products"]
    return rates


def run_sides(given: argparse.Namespace, settings: Settings, place: Path, report: Report) -> dict[str, Path]:
    """Every side once in each repeat; each one's last file of the first prompt."""
    report["runs"], files = [], {}
    for repeat in range(1, given.repeats + 1):
        for side in given.sides:
            record, file = side.run(settings, place / "work")
            report["runs"].append({"repeat": repeat, **record})
            print(f"{side.name}: {record['error'] or 'done'}, {record['wall_s']:.1f} s", file=sys.stderr)
            if file and given.closeness:
                files[side.name] = place / f"{side.name}.safetensors"
                shutil.move(file, files[side.name])
            keep(report, given.json)
    return files


def closeness(sides: Sequence[Side], files: dict[str, Path], runs: Sequence[Report]) -> list[Report]:
    """Every side's file against another's: a batch's against the single one of its dtype, that against float32's."""
    losses: Report = {record["side"]: record.get("losses") for record in runs}
    found = []
    for side in sides:
        other = side.dtype if side.kind == "batch" else "float32"
        if side.name in files and other in files and other != side.name:
            compared = compare_files(files[side.name], files[other])
            differing = compare_losses(losses[side.name], losses[other])
            found.append({"side": side.name, "to": other, "losses": differing, "encoders": compared})
    return found


def grow(size: int, given: argparse.Namespace, settings: Settings) -> Report:
    """So many prompts in one bank, in a process of its own."""
    command = [sys.executable, str(HERE / "speed_growth.py"), "--model", settings.model, "--prompts", str(size)]
    command += ["--model-folder", str(settings.folder), "--dtype", given.growth_dtype, "--device", given.device]
    read_through(settings.folder)
    measured = measure([*command, "--iterations", str(given.growth_iterations)], settings.threads)
    said = {} if measured.error else json.loads(measured.stdout.strip().splitlines()[-1])
    return {"prompts": size, "dtype": given.growth_dtype, **said, "wall_s": measured.wall, "error": measured.error}


def summarize(report: Report, given: argparse.Namespace, work: Work) -> None:
    """Medians of each side, their ratios to the baseline's, and shares of the machine's rate."""
    report["sides"] = {}
    for side in given.sides:
        runs = [record for record in report["runs"] if record["side"] == side.name and not record["error"]]
        if not runs:
            continue
        own: Report = {name: _median([record[name] for record in runs]) for name in MEASURES}
        own |= {"prompts": side.prompts, "dtype": side.dtype, "wall_per_prompt_s": own["wall_s"] / side.prompts}
        own["cpu_per_prompt_s"] = own["cpu_s"] / side.prompts
        command = own["wall_s"] / given.iterations if given.iterations else None
        own["share_of_steps"] = _shares(report, work, side.dtype, side.prompts, own["seconds_per_step"])
        own["share_of_command"] = _shares(report, work, side.dtype, side.prompts, command)
        report["sides"][side.name] = own
    baseline = report["sides"].get("baseline")
    for own in report["sides"].values() if baseline else ():
        compared = ("wall_per_prompt_s", "cpu_per_prompt_s", "peak_bytes")
        own["ratio"] = {name: own[name] / baseline[name] for name in compared}
    for row in report.get("growth", ()):
        row["share_of_steps"] = _shares(report, work, row["dtype"], row["prompts"], row.get("seconds_per_step"))


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _shares(report: Report, work: Work, dtype: str, prompts: int, seconds: float | None) -> dict[str, float] | None:
    """Share of the machine's rates that so many seconds per step are, for all prompts together."""
    rates = report.get("rates", {}).get("rates", {}).get(dtype, {}).get(str(prompts))
    if not seconds or not rates:
        return None
    return {name: work.flops * prompts / seconds / 1e9 / rate for name, rate in rates.items()}


if __name__ == "__main__":
    raise SystemExit(main())
