"""Examining a plugin of any kind: its record and options first, which all kinds share, then what its kind is for."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields
from typing import Any

from lora_forge.errors import PluginError, UsageError
from lora_forge.hookspecs import EXTENSION_POINTS
from lora_forge.options import Text, Unfit, check_bounds, options_as_dict, parse_options, plain
from lora_forge.plugin_rules import check_spec
from lora_forge.plugins import Plugin, Supplied, build
from lora_forge.records import BackendSpec, ExecutorSpec, InitializerSpec, LossSpec, OptimizerSpec, SaverSpec, Spec
from lora_forge.testing.examination import Book, Broken, Examination, Halt, in_words

# The module that examines each kind, by a function of that name: (book, spec, options, make) -> None.
_EXAMINERS = {kind: f"lora_forge.testing.{kind}" for kind in EXTENSION_POINTS}

Make = Callable[[], Callable[..., Any]]


def check_loss(spec: LossSpec, options: Any | None = None) -> None:
    """Raises NotConforming with everything that is wrong with a loss, run on `tiny_sdxl`, and once on `tiny_sd15`.

    options: an instance of `spec.options`; the defaults if it is not given. Raises UsageError if an option has no
    default and none was given.
    """
    _check(LossSpec, spec, options)


def check_initializer(spec: InitializerSpec, options: Any | None = None) -> None:
    """As `check_loss`, for an initializer, on layers of `tiny_sdxl`."""
    _check(InitializerSpec, spec, options)


def check_optimizer(spec: OptimizerSpec, options: Any | None = None) -> None:
    """As `check_loss`, for an optimizer, on a bank of `tiny_sdxl` layers."""
    _check(OptimizerSpec, spec, options)


def check_saver(spec: SaverSpec, options: Any | None = None) -> None:
    """As `check_loss`, for a saver, which writes weights of `tiny_sdxl` and `tiny_sd15` to a temporary folder."""
    _check(SaverSpec, spec, options)


def check_backend(spec: BackendSpec, options: Any | None = None) -> None:
    """As `check_loss`, for a backend, on the model that its `tiny` names."""
    _check(BackendSpec, spec, options)


def check_executor(spec: ExecutorSpec, options: Any | None = None) -> None:
    """As `check_loss`, for an executor, with workers on this machine that train nothing."""
    _check(ExecutorSpec, spec, options)


def examine(spec: Spec, options: Any | None = None, *, beside: Iterable[Spec] = ()) -> Examination:
    """Examine a plugin of any kind. What it raises is a finding; nothing of it ends the examination unsaid.

    beside: the others that are there, such as backends that may claim the same base models; those that ship always are.
    Raises UsageError for options that are missing, or of another type than the spec's.
    """
    kind = _kind(spec)
    book = Book(kind, tuple(beside))
    try:
        with book.rule("record", vital=True):
            _check_record(spec)
        _require_options(spec, options)
        with book.rule("options", vital=True):
            options = spec.options() if options is None else options
        with book.rule("bounds", vital=True):
            _check_bounds(spec.options, options)
        with book.rule("options", vital=True):
            _check_round_trip(options)
        supplied = Supplied(spec, Plugin(f"{spec.name}:given", spec.name, "", ""))

        def make() -> Callable[..., Any]:
            return build(supplied, options)

        with book.rule("builds", vital=True):
            _check_builds(make)
        examiner = getattr(importlib.import_module(_EXAMINERS[kind]), f"examine_{kind}")
        with book.rule("runs"):  # whatever is raised outside the check of a rule
            examiner(book, spec, options, make)
    except Halt:
        pass
    return book.examination(str(spec.name))


def _check(spec_type: type[Spec], spec: Any, options: Any) -> None:
    if not isinstance(spec, spec_type):
        raise UsageError(f"check_{spec_type.kind} takes a {spec_type.__name__}, got {type(spec).__name__}")
    examine(spec, options).require()


def _kind(spec: Any) -> str:
    for kind, (_, spec_type) in EXTENSION_POINTS.items():
        if isinstance(spec, spec_type):
            return kind
    known = ", ".join(spec_type.__name__ for _, spec_type in EXTENSION_POINTS.values())
    raise UsageError(f"{type(spec).__name__} is no spec; one of {known} is")


def _check_record(spec: Spec) -> None:
    hook, spec_type = EXTENSION_POINTS[spec.kind]
    try:
        check_spec(spec, spec_type, hook)
    except PluginError as error:
        raise Broken(str(error).removeprefix(f"{hook} yields ").removeprefix(f"{spec.name}: ")) from error
    if isinstance(spec, SaverSpec):
        _check_suffix(spec)


def _require_options(spec: Spec, options: Any) -> None:
    """Options that were not given, or are of another type, are the caller's mistake and not the plugin's."""
    if options is not None and type(options) is not spec.options:
        raise UsageError(
            f"{spec.kind} {spec.name!r} takes options of type {spec.options.__name__}, got {type(options).__name__}"
        )
    required = [f.name for f in fields(spec.options) if f.init and f.default is f.default_factory is MISSING]
    if options is None and required:
        raise UsageError(
            f"{spec.kind} {spec.name!r} cannot be examined without its required options ({', '.join(required)}): "
            f"give them, options={spec.options.__name__}({required[0]}=…)"
        )


def _check_bounds(options_type: type, options: Any) -> None:
    for field in fields(options_type):
        try:
            check_bounds(getattr(options, field.name), field.metadata)
        except Unfit as error:
            raise Broken(
                f"the value of {field.name!r} is outside the bounds that it declares itself: {error}"
            ) from error


def _check_round_trip(options: Any) -> None:
    """From JSON, as a file's metadata and run configs hold them, and as typed on a command line."""
    told = options_as_dict(options)
    try:
        stored = json.loads(json.dumps(told))
    except (TypeError, ValueError) as error:
        raise Broken(f"they cannot be stored as JSON ({error}); use the types that options may have") from error
    typed = {name: _typed(value) for name, value in told.items()}
    for way, given in (("stored as JSON and read back", stored), ("typed on a command line", typed)):
        back, problems = parse_options(type(options), given, key="")
        if problems:
            said = "; ".join(str(problem).removeprefix(".") for problem in problems)
            raise Broken(f"{way}, they are refused: {said}")
        if back != options:
            changed = [f.name for f in fields(options) if getattr(back, f.name) != getattr(options, f.name)]
            of = f"{changed[0]} was {getattr(options, changed[0])!r}, " if changed else ""
            now = (
                f"is {getattr(back, changed[0])!r}" if changed else "compare by identity; leave eq of the dataclass on"
            )
            raise Broken(f"{way}, they are not the same: {of}{now}")


def _typed(value: Any) -> Text:
    if value is None:
        return Text("none")
    return Text(json.dumps(plain(value)) if isinstance(value, bool | list) else str(value))


def _check_builds(make: Make) -> None:
    try:
        made = make()
    except PluginError as error:
        cause = error.__cause__
        raise Broken(f"the factory cannot be built: {in_words(cause) if cause else error}") from error
    if not callable(made):
        raise Broken(f"the factory gives a {type(made).__name__}, which cannot be called")


def _check_suffix(spec: SaverSpec) -> None:
    ending = spec.suffix.startswith(".") and spec.suffix[1:].strip(" .")
    if spec.folder and (spec.suffix == SaverSpec.suffix or not (ending or not spec.suffix)):
        raise Broken(f"suffix {spec.suffix!r} of a folder; suffix='' names it as it is given")
    if not spec.folder and not ending:
        raise Broken(
            f"suffix {spec.suffix!r} is no ending of a file name; it starts with a dot, such as '.safetensors'"
        )
