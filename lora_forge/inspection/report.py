"""A LoRA file told whole: what `inspect` prints, writes as JSON and puts on a page."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_forge.errors import printable, quoted
from lora_forge.files.lora_file import LoraFile
from lora_forge.files.names import RECORD_KEY
from lora_forge.inspection.layers import LayerReport, report_layers
from lora_forge.inspection.places import OUTSIDE, natural, place_of
from lora_forge.plugins import discover
from lora_forge.recognition import Family, OpenRegistry, open_known

_SEVERAL = 5


@dataclass(frozen=True)
class Group:
    """Some layers together, by component or by component and region.

    kinds, ranks, alphas: how many layers have each. delta_norm: of all ΔW together, None where none is known.
    effective_rank: the mean. nothing: layers whose ΔW is zero. faulty: layers with something else wrong with them.
    """

    component: str
    region: str
    layers: int
    kinds: Mapping[str, int]
    ranks: Mapping[int | None, int]
    alphas: Mapping[float | None, int]
    delta_norm: float | None
    effective_rank: float | None
    nothing: int
    faulty: int


@dataclass(frozen=True)
class FileReport:
    """measured: whether tensors were read, or the header alone."""

    lora: LoraFile
    family: Family
    layers: tuple[LayerReport, ...]
    measured: bool

    @property
    def name(self) -> str:
        return printable(str(self.lora.path))

    @property
    def dtypes(self) -> dict[str, int]:
        """How many tensors have each dtype, alphas aside unless there is nothing else."""
        parts = [(name, part) for layer in self.lora.layers for name, part in layer.parts.items()]
        weights = [part for name, part in parts if name != "alpha"] or [part for _, part in parts]
        return dict(Counter(part.stored.dtype for part in weights).most_common())

    @property
    def components(self) -> list[Group]:
        return _groups(self.layers, lambda layer: (layer.component or "", ""))

    @property
    def regions(self) -> list[Group]:
        return _groups(self.layers, _region)

    @property
    def faults(self) -> list[str]:
        """What is wrong, the file as a whole first, then layer by layer; layers of zeros aside."""
        known = dict.fromkeys(self.lora.faults)
        faults = list(known)
        for layer in self.layers:
            own = [fault for fault in layer.faults if fault not in known and fault != "does nothing"]
            faults += [fault if fault[0] in "'\"" else f"{quoted(layer.name)}: {fault}" for fault in own]
        return faults

    def as_dict(self) -> dict[str, Any]:
        """For JSON: numbers that are not finite are null."""
        lora = self.lora
        layers = [
            {key: _number(value) for key, value in asdict(layer).items()} | {"does_nothing": layer.does_nothing}
            for layer in self.layers
        ]
        return {
            "path": str(lora.path),
            "format": lora.format,
            "family": self.family.name,
            "backend": self.family.name if self.family.spec else None,
            "size": lora.size,
            "measured": self.measured,
            "dtypes": self.dtypes,
            "components": [_group_dict(group) for group in self.components],
            "metadata": dict(lora.metadata),
            "unknown_keys": list(lora.unknown),
            "faults": self.faults,
            "layers": layers,
        }


def report_file(
    path: Path,
    *,
    measure: bool = True,
    each: Callable[[int], None] = lambda total: None,
    registry: OpenRegistry = discover,
) -> FileReport:
    """Inspect one file, or one of PEFT's folders. Raises LoraFileError for what is not readable as one.

    measure: whether tensors are read. each: called after every layer with how many there are. registry: gives the
    plugins there are; called only for a file that may be of a plugin's family.
    """
    lora, family = open_known(path, registry)
    layers = []
    for layer in report_layers(lora, measure=measure):
        layers.append(layer)
        each(len(lora.layers))
    return FileReport(lora, family, tuple(layers), measure)


def shortened(text: str, length: int = 72) -> str:
    """Text from a file in one line that is safe to show, cut where it is long."""
    if len(text) <= length:
        return printable(text)
    return f"{printable(text[:length])}… ({len(text)} characters)"


def several(names: Sequence[str], most: int = _SEVERAL) -> str:
    """Some names, and how many more there are."""
    shown = ", ".join(shortened(name, 100) for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def counted(values: Mapping[Any, int], of: Callable[[Any], str] = str) -> str:
    """`8`, or `8 (×192), 4 (×30)` where there are several."""
    if len(values) == 1:
        return of(next(iter(values)))
    common = sorted(values.items(), key=lambda one: -one[1])
    shown = ", ".join(f"{of(value)} (×{count})" for value, count in common[:_SEVERAL])
    return f"{shown}, …" if len(common) > _SEVERAL else shown


def own_record(metadata: Mapping[str, str]) -> list[tuple[str, str]]:
    """What a file's record of the run that made it says, as label and text; nothing where it is not legible."""
    try:
        record = json.loads(metadata.get(RECORD_KEY, "{}"))
        run = record.get("run") or {}
        rows = [
            ("prompt", run.get("prompt")),
            ("model", run.get("base_model") or run.get("model")),
            ("objective", " + ".join(term_text(term) for term in run.get("loss") or [])),
            ("optimizer", plugin_text(run.get("optimizer") or {})),
            ("iterations", run.get("iterations")),
            ("kept", run.get("keep")),
            ("stops when", ", ".join(run.get("stop_when") or [])),
            ("seed", run.get("seed")),
            ("strength", record.get("strength")),
            ("conditioning shift", (record.get("effect") or {}).get("conditioning_shift")),
            ("versions", ", ".join(f"{name} {one}" for name, one in (record.get("versions") or {}).items())),
        ]
        return [(label, shortened(value_text(value), 300)) for label, value in rows if value not in (None, "")]
    except (ValueError, TypeError, AttributeError, RecursionError):
        return []


def term_text(term: Mapping[str, Any]) -> str:
    """A term of a recorded objective: `0.5 × name(option=value)`."""
    schedule = f" @ {value_text(term['schedule'])}" if "schedule" in term else ""
    return f"{value_text(term.get('weight', 1.0))} × {plugin_text(term)}{schedule}"


def plugin_text(record: Mapping[str, Any]) -> str:
    """A recorded plugin: `name(option=value)`."""
    options = ", ".join(f"{name}={value_text(value)}" for name, value in (record.get("options") or {}).items())
    return f"{record.get('name', '')}({options})" if options else str(record.get("name", ""))


def value_text(value: Any) -> str:
    """A recorded value, numbers in few digits."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _region(layer: LayerReport) -> tuple[str, str]:
    place = place_of(layer.component, layer.layer, layer.name)
    return place.component, place.region


def _groups(layers: Iterable[LayerReport], key: Callable[[LayerReport], tuple[str, str]]) -> list[Group]:
    groups: dict[tuple[str, str], list[LayerReport]] = {}
    for layer in layers:
        groups.setdefault(key(layer), []).append(layer)
    order = sorted(groups, key=lambda one: (one[0] == "", one[0], one[1] == OUTSIDE, natural(one[1])))
    return [_group(*one, groups[one]) for one in order]


def _group(component: str, region: str, layers: Sequence[LayerReport]) -> Group:
    norms = [layer.delta_norm for layer in layers if layer.delta_norm is not None]
    ranks = [layer.effective_rank for layer in layers if layer.effective_rank is not None and not layer.does_nothing]
    together = math.hypot(*norms) if norms else None
    return Group(
        component=component,
        region=region,
        layers=len(layers),
        kinds=Counter(layer.kind for layer in layers),
        ranks=Counter(layer.rank for layer in layers),
        alphas=Counter(math.nan if layer.alpha != layer.alpha else layer.alpha for layer in layers),  # one NaN
        delta_norm=together,
        effective_rank=sum(ranks) / len(ranks) if ranks else None,
        nothing=sum(layer.does_nothing for layer in layers),
        faulty=sum(any(fault != "does nothing" for fault in layer.faults) for layer in layers),
    )


def _group_dict(group: Group) -> dict[str, Any]:
    return {
        "component": group.component or None,
        "layers": group.layers,
        "kinds": dict(group.kinds),
        "ranks": [{"value": rank, "layers": count} for rank, count in group.ranks.items()],
        "alphas": [{"value": _number(alpha), "layers": count} for alpha, count in group.alphas.items()],
        "delta_norm": _number(group.delta_norm),
        "effective_rank": group.effective_rank,
        "do_nothing": group.nothing,
        "faulty": group.faulty,
    }


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
