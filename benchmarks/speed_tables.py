"""What `speed.py` prints: the report as markdown tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

Report = dict[str, Any]


def render(report: Report) -> str:
    """All tables that the report has something for."""
    parts = [_machine(report)]
    if "rates" in report:
        parts.append(_rates(report["rates"]["rates"]))
    if report["runs"]:
        parts.append(_sides(report))
    if report.get("closeness"):
        parts.append(_closeness(report["closeness"]))
    if report.get("growth"):
        parts.append(_growth(report["growth"]))
    return "\n\n".join(parts)


def _machine(report: Report) -> str:
    machine, work = report["machine"], report["work"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    return (
        f"{machine['cpu']}, {machine['cores']} cores ({' '.join(machine['flags'])}), threads: {machine['threads']}, "
        f"load before: {machine['load_before']:.1f}\n"
        f"python {machine['python']}, {versions}\n"
        f"a step: {work['flops_per_step'] / 1e9:.4g} GFLOP per prompt"
        f" (4 · {work['matrix_parameters'] / 1e9:.3g} billion · {work['tokens']} tokens)"
    )


def _rates(rates: dict[str, Any]) -> str:
    rows = (
        (dtype, prompts, f"{own['best']:.3g}", f"{own['once']:.3g}")
        for dtype, sizes in rates.items()
        for prompts, own in sizes.items()
    )
    return _table(("machine's rate, GFLOP/s", "prompts", "best routes", "weights held once"), rows)


def _sides(report: Report) -> str:
    heads = (
        "side",
        "wall",
        "per prompt",
        "CPU",
        "s/step",
        "share of rate",
        "with all around",
        "peak",
        "wall",
        "memory",
    )
    return _table(heads, _side_rows(report)) + "\n" + _SHARES


_SHARES = (
    "In seconds. Share: of the best routes' rate / of the best with weights held once; with all around: the command's."
    " The last two: ratios to the baseline, of wall per prompt and of peak memory."
)


def _side_rows(report: Report) -> Iterator[Sequence[str]]:
    for name in dict.fromkeys(record["side"] for record in report["runs"]):
        own = report["sides"].get(name)
        if own is None:
            error = next(record["error"] for record in report["runs"] if record["side"] == name)
            yield (name, f"failed: {error}")
            continue
        ratio = own.get("ratio", {})
        yield (
            name,
            f"{own['wall_s']:.1f}",
            f"{own['wall_per_prompt_s']:.1f}",
            f"{own['cpu_s']:.1f}",
            _number(own["seconds_per_step"], ".3f"),
            _share(own["share_of_steps"]),
            _share(own["share_of_command"]),
            _bytes(own["peak_bytes"]),
            _number(ratio.get("wall_per_prompt_s"), ".3f"),
            _number(ratio.get("peak_bytes"), ".3f"),
        )


def _closeness(comparisons: Sequence[Report]) -> str:
    heads = (
        "file",
        "held against",
        "losses differ",
        "encoder",
        "cosine",
        "relative error",
        "layers: least",
        "5 %",
        "median",
    )
    rows = (
        (
            one["side"],
            one["to"],
            f"{one['losses']:.1e}",
            encoder,
            _number(own["cosine"], ".6f"),
            _number(own["relative_error"], ".1e"),
            *(_number((own["layer_cosines"] or {}).get(name), ".5f") for name in ("min", "5%", "median")),
        )
        for one in comparisons
        for encoder, own in one["encoders"].items()
    )
    return _table(heads, rows)


def _growth(sizes: Sequence[Report]) -> str:
    heads = (
        "prompts",
        "s/step",
        "per prompt",
        "share of rate",
        "peak",
        "grown by",
        "expected",
        "bank",
        "saved",
        "results",
    )
    return _table(heads, _growth_rows(sizes)) + "\n" + _GROWTH


_GROWTH = (
    "Grown by: peak memory per prompt more than the first row has. Expected: bank, saved activations and results per "
    "prompt, each in its own column."
)


def _growth_rows(sizes: Sequence[Report]) -> Iterator[Sequence[str]]:
    parts = ("bank_bytes", "saved_bytes", "result_bytes")
    first = next((row for row in sizes if not row["error"]), None)
    for row in sizes:
        prompts = row["prompts"]
        if row["error"] or first is None:
            yield (str(prompts), f"failed: {row['error']}")
            continue
        more = prompts - first["prompts"]
        grown = _bytes((row["peak_bytes"] - first["peak_bytes"]) / more) if more else "–"
        yield (
            str(prompts),
            f"{row['seconds_per_step']:.3f}",
            f"{row['seconds_per_step'] / prompts:.3f}",
            _share(row["share_of_steps"]),
            _bytes(row["peak_bytes"]),
            grown,
            _bytes(sum(row[part] for part in parts) / prompts),
            *(_bytes(row[part] / prompts) for part in parts),
        )


def _table(heads: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    cells = [heads, *((*row, *[""] * (len(heads) - len(row))) for row in rows)]
    widths = [max(len(row[column]) for row in cells if len(row[1]) < 30 or column < 1) for column in range(len(heads))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _share(shares: dict[str, float] | None) -> str:
    return "–" if shares is None else f"{shares['best']:.2f} / {shares['once']:.2f}"


def _bytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if abs(count) >= 2**30 else f"{count / 2**20:.4g} MiB"
