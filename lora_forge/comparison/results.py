"""What a comparison of objectives measured: `results.jsonl`, from which its whole report can be made again.

The first line is about the comparison, and each line after it about one LoRA: an objective, a prompt and a seed. A
number that is not finite is null in the file, and None here. Keys that are not known are passed over.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, get_args, get_origin, get_type_hints

from lora_forge.errors import UsageError, nearest, printable, quoted
from lora_forge.options import Unfit, read_value
from lora_forge.output import Place, appearing, json_line, place_of

if TYPE_CHECKING:
    import pandas

FORMAT = 1
KIND = "comparison"
NAME = "results.jsonl"

Number: TypeAlias = float | None
Table: TypeAlias = Literal["runs", "terms", "cross", "steps"]
_Record = TypeVar("_Record")


@dataclass(frozen=True)
class Objective:
    """One of the objectives compared.

    name: what it is called throughout, unique. formula: what it computes, in the words of its losses. reach: by
    component, the target layers that its gradient reached and how many there are; None where that is not known. inert:
    the layers out of its reach, as `component.layer`.
    """

    name: str
    formula: str
    needs: tuple[str, ...]
    reach: Mapping[str, tuple[int, int]] | None
    inert: tuple[str, ...]


@dataclass(frozen=True)
class Header:
    """What was compared: every combination of objectives, prompts and seeds, each with the same budget.

    prompts: how many. iterations, seconds: the budget of a LoRA; one of them may be None. controls: prompts that have
    nothing to do with those trained. paraphrases: templates with `{prompt}`. threads: of the CPU. settings: what else
    was asked for.
    """

    model: str
    base_model: str
    objectives: tuple[Objective, ...]
    prompts: int
    seeds: tuple[int, ...]
    iterations: int | None
    seconds: float | None
    controls: tuple[str, ...]
    paraphrases: tuple[str, ...]
    versions: Mapping[str, str]
    threads: int
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Change:
    """A value before training and after it."""

    before: Number
    after: Number

    @property
    def difference(self) -> Number:
        return None if self.before is None or self.after is None else self.after - self.before


@dataclass(frozen=True)
class Cross(Change):
    """An objective's value, without L2, whoever was trained. random: under the random LoRA of equal norm."""

    random: Number


@dataclass(frozen=True)
class Specificity:
    """Conditioning shifts: of the prompt trained on, of paraphrases and controls on average, and of the empty prompt.

    ratio: own / controls; None where there are no controls, or none of them moves.
    """

    own: Number
    paraphrases: Number
    controls: Number
    empty: Number
    ratio: Number


@dataclass(frozen=True)
class RandomControl:
    """The same of a LoRA with random A and B whose ‖ΔW‖ is the trained one's in every layer."""

    conditioning_shift: Number
    specificity: Specificity


@dataclass(frozen=True)
class Measured:
    """What was measured of one LoRA.

    loss: the whole objective, with L2. terms: by label, unweighted. cross: by the objective's name, of all objectives.
    shifts: of each part of the conditioning. delta_norm: ‖ΔW‖ of all layers together. effective_rank: mean over the
    layers reached that have a ΔW (Roy & Vetterli 2007). steps: the objective before each update. seconds,
    seconds_per_step: its share of its batch's. peak_memory: bytes, of all that were made with it. file, image: relative
    to the results' folder.
    """

    loss: Change
    terms: Mapping[str, Change]
    cross: Mapping[str, Cross]
    conditioning_shift: Number
    shifts: Mapping[str, Number]
    specificity: Specificity
    delta_norm: Number
    component_norms: Mapping[str, Number]
    effective_rank: Number
    random: RandomControl
    steps: tuple[Number, ...]
    iterations: int
    seconds: Number
    seconds_per_step: Number
    peak_memory: int | None
    file: str | None
    image: str | None


@dataclass(frozen=True)
class Row:
    """One LoRA, or why there is none: either `error` or `measured` is None."""

    objective: str
    prompt: str
    seed: int
    error: str | None
    measured: Measured | None

    def __post_init__(self) -> None:
        if (self.error is None) == (self.measured is None):
            raise ValueError("a row has either an error or what was measured")


@dataclass(frozen=True)
class Results:
    """All of a comparison."""

    header: Header
    rows: tuple[Row, ...]

    def of(self, objective: str) -> list[Row]:
        """The rows of one objective that did not fail."""
        return [row for row in self.rows if row.objective == objective and row.measured is not None]

    def frame(self, table: Table = "runs") -> pandas.DataFrame:
        """A tidy pandas frame. Raises UsageError where pandas is not installed.

        table: `runs` has a row per LoRA, failed ones too; `terms` one per LoRA and term of its objective; `cross` one
        per LoRA and objective measured; `steps` one per LoRA and step, the first of which is step 1.
        """
        try:
            import pandas
        except ImportError as error:
            raise UsageError("a frame needs pandas: pip install lora-forge[lab]") from error
        if table not in get_args(Table):
            raise UsageError(f"there is no table {table!r}{nearest(table, get_args(Table))}")
        made = {"runs": _run, "terms": _terms, "cross": _cross, "steps": _steps}[table]
        return pandas.DataFrame([line for row in self.rows for line in made(row)])


def read_results(path: str | Path | Place) -> Results:
    """The results in a file, or in the folder of a comparison. Raises UsageError, in one line, for what is none."""
    place = place_of(str(path))
    try:
        if place.is_dir():
            place = place / NAME
        lines = place.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"{str(place)!r} is not text in UTF-8") from error
    except Exception as error:  # of the disk, or of whatever package serves a store
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UsageError(f"results {str(path)!r} cannot be read: {printable(reason)}") from error
    shown = printable(str(place))
    if lines == [""]:
        raise UsageError(f"{shown} is empty")
    header = _header(lines[0], f"{shown}, line 1")
    names = [one.name for one in header.objectives]
    rows = tuple(_row(line, f"{shown}, line {number}", names) for number, line in enumerate(lines[1:], 2))
    return Results(header, rows)


def write_results(path: Place, results: Results) -> None:
    """Write the file, which appears whole or not at all, in place of one that is there. Raises OutputError."""
    with appearing(path, overwrite=True) as temporary:
        text = "".join(f"{json_line(line)}\n" for line in _lines(results))
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def _lines(results: Results) -> Iterator[Mapping[str, Any]]:
    yield {"format": FORMAT, "kind": KIND, **asdict(results.header)}
    for row in results.rows:
        line = asdict(row)
        yield line | (line.pop("measured") or {})


def _header(line: str, where: str) -> Header:
    value = _object(line, where)
    if value.get("kind") != KIND:
        raise UsageError(f"{where}: this is not about a comparison of lora-forge's")
    if value.get("format") != FORMAT:
        raise UsageError(f"{where}: has format {value.get('format')!r}, and this lora-forge reads format {FORMAT}")
    header = _checked(Header, value, where)
    names = [one.name for one in header.objectives]
    if not names:
        raise UsageError(f"{where}: there are no objectives")
    if len(set(names)) < len(names):
        raise UsageError(f"{where}: two objectives have one name")
    return header


def _row(line: str, where: str, objectives: Sequence[str]) -> Row:
    value = _object(line, where)
    failed = value.get("error") is not None
    row = _checked(Row, {**value, "measured": None if failed else value}, where)
    for name in (row.objective, *(row.measured.cross if row.measured else ())):
        if name not in objectives:
            raise UsageError(f"{where}: {quoted(name)} is not one of the objectives of line 1")
    return row


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: this is not JSON") from error
    if not isinstance(value, dict):
        raise UsageError(f"{where}: this is no JSON object")
    return value


def _checked(kind: type[_Record], value: Any, where: str) -> _Record:
    try:
        return _read(kind, value, "")  # type: ignore[no-any-return]
    except (ValueError, RecursionError) as error:  # Unfit is one
        raise UsageError(f"{where}: {printable(str(error))}") from error


def _read(hint: Any, value: Any, key: str) -> Any:
    """`value` as the declared type; records and mappings are gone through. Raises Unfit, which names the key."""
    inner = [arm for arm in get_args(hint) if arm is not type(None)]
    if len(inner) < len(get_args(hint)):
        return None if value is None else _read(inner[0], value, key)
    if is_dataclass(hint):
        return _read_record(hint, value, key)
    if get_origin(hint) is Mapping:
        given = _entries(value, key)
        return {name: _read(inner[1], one, f"{key}.{name}" if key else name) for name, one in given.items()}
    if get_origin(hint) is tuple and is_dataclass(inner[0]):
        if not isinstance(value, list):
            raise Unfit(f"{key!r}: expected a list, got {value!r:.80}")
        return tuple(_read(inner[0], one, f"{key}.{number}") for number, one in enumerate(value))
    if hint is Any:
        return value
    try:
        return read_value(hint, value)
    except Unfit as error:
        raise Unfit(f"{key!r}: {str(error)[:200]}") from error


def _read_record(hint: Any, value: Any, key: str) -> Any:
    given, hints = _entries(value, key), get_type_hints(hint)
    made = {}
    for field in fields(hint):
        inside = f"{key}.{field.name}" if key and key != "measured" else field.name
        if field.name not in given:
            raise Unfit(f"{inside!r} is missing")
        made[field.name] = _read(hints[field.name], given[field.name], inside)
    return hint(**made)


def _entries(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Unfit(f"{key!r}: expected an object, got {value!r:.80}")
    return value


def _run(row: Row) -> Iterator[dict[str, Any]]:
    """A line of the frame `runs`: what has names of its own, as one column for each, joined by dots."""
    line = asdict(row)
    measured = line.pop("measured") or {}
    flat = _flat({key: one for key, one in measured.items() if key not in ("terms", "cross", "steps")})
    yield line | dict(flat)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _terms(row: Row) -> Iterator[dict[str, Any]]:
    for label, change in (row.measured.terms if row.measured else {}).items():
        yield _key(row) | {"term": label} | asdict(change)


def _cross(row: Row) -> Iterator[dict[str, Any]]:
    for name, cross in (row.measured.cross if row.measured else {}).items():
        yield _key(row) | {"measured": name} | asdict(cross)


def _steps(row: Row) -> Iterator[dict[str, Any]]:
    for number, value in enumerate(row.measured.steps if row.measured else (), 1):
        yield _key(row) | {"step": number, "value": value}


def _key(row: Row) -> dict[str, Any]:
    return {"objective": row.objective, "prompt": row.prompt, "seed": row.seed}
