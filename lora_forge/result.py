"""What a run returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_forge.events import RunInfo

if TYPE_CHECKING:
    from lora_forge.contracts import LoraWeights
    from lora_forge.effect.measure import Effect
    from lora_forge.effect.probe import Probe
    from lora_forge.output import Place


@dataclass(frozen=True)
class Values:
    """The objective at one moment: its total, each term unweighted, and L2."""

    loss: float
    terms: Mapping[str, float]
    l2: float

    def as_dict(self) -> dict[str, Any]:
        return {"loss": self.loss, "terms": dict(self.terms), "l2": self.l2}


@dataclass(frozen=True)
class RunResult:
    """One prompt's LoRA and what is known about it.

    path: the file (or folder) written, None if none was asked for; of a URL, fsspec's `UPath`.
    files: all files written, `path` first.
    weights: `dict[component, dict[layer, {"lora_A": (rank, in), "lora_B": (out, rank)}]]`, float32, CPU,
        all layers, whatever the file leaves out.
    steps: the objective before each update. updates: how many the weights have behind them: fewer than there were
        iterations where training stopped early, or an earlier iterate was the best. loss_before, loss_after: before the
        first update, and of the weights as saved.
    seconds_per_step: of the whole batch; None without steps.
    measured: losses that were evaluated and not trained, (before, after) by label; None of one that raised.
    probe: what else was measured, if that was asked for.
    inert: layers the objective cannot reach, as `component.layer`; dropped: those of them the file leaves
        out; padded: layers of zeros that the file format demands.
    metadata: what the run records in the file, beside what its saver adds.
    rounding: ‖ΔW as saved − ΔW‖ / ‖ΔW‖, the largest of all layers; 0 in float32.
    usage: the lines of Python that use the file; "" where no file of this machine was written.
    seconds: durations by phase (never in the file).
    """

    run: RunInfo
    path: Place | None
    files: tuple[Place, ...]
    weights: LoraWeights = field(repr=False)
    rank: int
    alpha: float
    steps: tuple[Values, ...] = field(repr=False)
    before: Values
    after: Values
    updates: int
    seconds_per_step: float | None
    effect: Effect
    measured: Mapping[str, tuple[float | None, float | None]]
    probe: Probe | None = field(repr=False)
    inert: tuple[str, ...] = field(repr=False)
    dropped: tuple[str, ...] = field(repr=False)
    padded: tuple[str, ...] = field(repr=False)
    strength: float
    rounding: float
    warnings: tuple[str, ...]
    metadata: Mapping[str, str] = field(repr=False)
    usage: str = field(repr=False)
    seconds: Mapping[str, float] = field(repr=False)

    @property
    def loss_before(self) -> float:
        return self.before.loss

    @property
    def loss_after(self) -> float:
        return self.after.loss

    def as_dict(self) -> dict[str, Any]:
        """Everything but the tensors, ready for JSON."""
        return {
            "path": str(self.path) if self.path else None,
            "files": [str(place) for place in self.files],
            "prompt": self.run.prompt,
            "model": self.run.model,
            "seed": self.run.seed,
            "iterations": self.run.iterations,
            "run_id": self.run.id,
            "rank": self.rank,
            "alpha": self.alpha,
            "strength": self.strength,
            "rounding": self.rounding,
            "before": self.before.as_dict(),
            "after": self.after.as_dict(),
            "steps": [values.as_dict() for values in self.steps],
            "updates": self.updates,
            "effect": self.effect.as_dict(),
            **({"measured": {label: list(pair) for label, pair in self.measured.items()}} if self.measured else {}),
            **({"probe": self.probe.as_dict()} if self.probe else {}),
            "inert_layers": len(self.inert),
            "dropped_layers": len(self.dropped),
            "padded_layers": list(self.padded),
            "warnings": list(self.warnings),
            "usage": self.usage,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }
