"""The plan of a run: a run config with every name resolved and every option checked, before anything heavy."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lora_forge.choices import Chosen, ChosenTerm, choose, choose_savers, choose_terms, solved, with_learning_rate
from lora_forge.config.model import ModelConfig, expand_targets, read_model_config
from lora_forge.config.run import DEFAULT_ITERATIONS, DEFAULT_L2, DEFAULT_SAVER, Choice, RunConfig
from lora_forge.contracts import BackendRequest
from lora_forge.errors import ConfigError, LoraForgeError, ObjectiveError, Problem, blaming
from lora_forge.files.header import nothing_at
from lora_forge.naming import OutputFiles, name_files
from lora_forge.plugins import Registry
from lora_forge.recognition import recognized_backend
from lora_forge.records import BackendSpec, InitializerSpec, OptimizerSpec, SaverSpec

if TYPE_CHECKING:
    from lora_forge.output import Place

IN_MEMORY = "in memory"  # the base model of a run on a pipeline
NO_PROMPT = 'is missing or empty; give one with --prompt "a steampunk owl", or as `prompt` in a run config'


@dataclass(frozen=True)
class Request:
    """What is a prompt's own within a batch."""

    prompt: str
    prompt_2: str | None
    seed: int
    output: Place | None


def short_digest(value: Any) -> str:
    """Twelve hex digits that are the same for the same JSON-ready value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Plan:
    """What will be done. `load` are the components to load, `encoders` the text encoders that the objective runs.

    terms: what is trained. measured: losses that are only evaluated, before and after.
    init_from: the earlier file's name and sha256, read once.
    """

    config: RunConfig
    model: ModelConfig
    backend: Chosen
    initializer: Chosen
    terms: tuple[ChosenTerm, ...]
    measured: tuple[ChosenTerm, ...]
    optimizer: Chosen
    savers: tuple[Chosen, ...]
    base_model: str
    rank: int
    alpha: float
    iterations: int
    l2: float
    load: tuple[str, ...]
    encoders: tuple[str, ...]
    init_from: str | None

    @property
    def backend_spec(self) -> BackendSpec:
        return cast(BackendSpec, self.backend.supplied.spec)

    @property
    def initializer_spec(self) -> InitializerSpec:
        return cast(InitializerSpec, self.initializer.supplied.spec)

    @property
    def optimizer_spec(self) -> OptimizerSpec:
        return cast(OptimizerSpec, self.optimizer.supplied.spec)

    @property
    def loaded_encoders(self) -> tuple[str, ...]:
        """The text encoders that are loaded, whether for the objective or for what is measured."""
        return tuple(encoder for encoder in self.backend_spec.encoders if encoder in self.load)

    @property
    def saver_specs(self) -> tuple[SaverSpec, ...]:
        return tuple(cast(SaverSpec, saver.supplied.spec) for saver in self.savers)

    @property
    def closed_form(self) -> bool:
        """Whether the weights are solved for, in place of the step loop."""
        return solved(self.terms)

    def files(self, output: Place) -> OutputFiles:
        """What a run with this output writes. Raises OutputError for a name that will not do."""
        config = self.config
        sidecar = config.sidecar
        if sidecar is None:
            sidecar = any(saver.supplied.is_builtin and saver.name == DEFAULT_SAVER for saver in self.savers)
        return name_files(output, self.saver_specs, sidecar=sidecar, report=config.report, preview=config.preview)

    def record(self) -> dict[str, Any]:
        """The resolved run as JSON-ready values, without a path of this machine in it."""
        config = self.config
        return {
            "prompt": config.prompt,
            "prompt_2": config.prompt_2,
            "model": self.model.name,
            "model_config_sha256": self.model.digest,
            "base_model": portable(self.base_model),
            "rank": self.rank,
            "alpha": self.alpha,
            "iterations": self.iterations,
            "l2": self.l2,
            "seed": config.seed,
            "dtype": config.dtype,
            **({"tf32": True} if config.tf32 else {}),
            "dtype_out": config.dtype_out,
            "inert": config.inert,
            "init_from": self.init_from,
            **({"keep": config.keep} if config.keep != "last" else {}),
            **({"stop_when": list(config.stop_when)} if config.stop_when else {}),
            "strength": config.strength,
            "target_shift": config.target_shift,
            "loss": [term.record() for term in self.terms],
            "initializer": self.initializer.record(),
            "optimizer": self.optimizer.record(),
            "saver": [saver.record() for saver in self.savers],
            "backend": self.backend.record(),
        }

    def record_of(self, request: Request, saver: Chosen | None = None) -> dict[str, Any]:
        """The record of one request of a batch; of the file that one of its savers writes, which names no other."""
        own = {"prompt": request.prompt, "prompt_2": request.prompt_2, "seed": request.seed}
        return {**self.record(), **own, **({"saver": saver.record()} if saver else {})}

    def run_id(self, request: Request) -> str:
        """The id of a run: the same for the same request, whatever else is in its batch."""
        return short_digest(self.record_of(request))


def make_plan(
    config: RunConfig,
    registry: Registry,
    *,
    in_memory: bool = False,
    mistakes: Sequence[Problem] = (),
    source: str = "",
) -> Plan:
    """Resolve a run config. Reads no weights, and imports nothing heavy unless the model config has mistakes or names
    no backend.

    in_memory: the model is a pipeline already loaded, so that no base model need be named.
    mistakes: those already found in the run config, to be reported together with what is found here.
    Raises ConfigError with every mistake, or ObjectiveError.
    """
    problems: list[Problem] = [*mistakes]
    problems += _without_consequences(_text_problems(config), mistakes)
    model, whole = _read_model(config, problems)
    base_model = config.base_model or (model.base_model if model else None)
    backend = _backend(registry, config, model, IN_MEMORY if in_memory else base_model, problems)
    initializer = choose(registry, "initializer", config.initializer, problems)
    optimizer = choose(registry, "optimizer", with_learning_rate(registry, config.optimizer, model), problems)
    savers = choose_savers(registry, config.saver, problems)
    terms = choose_terms(registry, config.loss, problems)
    measured = choose_terms(registry, config.measure, problems, key="measure")
    if model and not base_model and not in_memory:
        problems.append(Problem("base_model", f"model config {model.name!r} names none; give one"))
    if config.init_from and not os.path.exists(config.init_from):
        problems.append(Problem("init_from", nothing_at(config.init_from)))
    if backend and model and not whole:
        problems += _without_consequences(_against_architecture(model, backend, base_model, config), problems)
    if problems or not (model and backend and initializer and optimizer and savers):
        raise ConfigError(source if mistakes else "", problems)
    load, encoders = _components(cast(BackendSpec, backend.supplied.spec), model, terms, measured, config)
    return Plan(
        config=config,
        model=model,
        backend=backend,
        initializer=initializer,
        terms=terms,
        measured=measured,
        optimizer=optimizer,
        savers=savers,
        base_model=IN_MEMORY if in_memory or not base_model else base_model,
        rank=config.rank or model.lora_rank,
        alpha=config.alpha or model.lora_alpha,
        iterations=0 if solved(terms) else _first(config.iterations, model.iterations, DEFAULT_ITERATIONS),
        l2=0.0 if solved(terms) else _first(config.l2, model.regularization_strength, DEFAULT_L2),
        load=load,
        encoders=encoders,
        init_from=_named_file(config.init_from),
    )


def portable(value: str) -> str:
    """A Hub id or known name as it is; of a path on this machine, the last part only."""
    return Path(value).name if os.path.exists(value) else value


def _text_problems(config: RunConfig) -> list[Problem]:
    problems = []
    if not config.prompt.strip():
        problems.append(Problem("prompt", "is blank" if config.prompt else NO_PROMPT))
    for key, text in (("prompt", config.prompt), ("prompt_2", config.prompt_2 or "")):
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            problems.append(Problem(key, f"is not valid Unicode: {text!r}"))
    return problems


def _read_model(config: RunConfig, problems: list[Problem]) -> tuple[ModelConfig | None, bool]:
    """The model config, or what is usable of it, and whether it is whole."""
    try:
        return read_model_config(config.model), True
    except ConfigError as error:
        problems += [Problem(f"{error.source}: {p.key}".rstrip(": "), p.message) for p in error.problems]
        return error.usable, False
    except LoraForgeError as error:
        problems.append(Problem("model", str(error)))
        return None, False


def _against_architecture(
    model: ModelConfig, backend: Chosen, base_model: str | None, config: RunConfig
) -> list[Problem]:
    """What else is wrong with a model config that has mistakes, if the base model is on this machine."""
    if not base_model or ("/" in base_model and not os.path.exists(base_model)):
        return []
    try:
        with blaming(f"backend {backend.name!r}"):
            architecture = backend.build()(BackendRequest(base_model, "cpu", "float32")).architecture()
        expand_targets(model, architecture, rank=config.rank or model.lora_rank)
    except ConfigError as error:
        return [Problem(f"{Path(config.model).name}: {p.key}", p.message) for p in error.problems]
    except LoraForgeError:
        pass  # the base model's own mistakes come when the config has none
    return []


def _without_consequences(problems: Sequence[Problem], earlier: Sequence[Problem]) -> list[Problem]:
    """Problems without those that only follow from an earlier one, with the same key or the key above it."""
    keys = [one.key for one in earlier if one.key]
    return [p for p in problems if not any(p.key == key or p.key.startswith(f"{key}.") for key in keys)]


def _components(
    backend: BackendSpec,
    model: ModelConfig,
    terms: tuple[ChosenTerm, ...],
    measured: tuple[ChosenTerm, ...],
    config: RunConfig,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Which components to load and which encoders to run: under `text` alone, the encoders with target layers."""
    needs = frozenset[str]().union(*(term.needs for term in terms))
    all_needs = needs.union(*(term.needs for term in measured))
    unserved = all_needs - set(backend.reaches)
    if unserved:
        asking = next(term.label for term in (*terms, *measured) if term.needs & unserved)
        raise ObjectiveError(
            f"loss {asking!r} needs {', '.join(sorted(unserved))}, which backend {backend.name!r} does not provide"
        )
    targeted = {component for component, layers in model.targets.items() if layers}
    reachable = {component for need in needs for component in backend.reaches[need]}
    if not targeted & reachable:
        raise ObjectiveError(
            f"the objective ({', '.join(t.label for t in terms)}) reaches "
            f"{', '.join(sorted(reachable)) or 'nothing'}, but the target layers of {model.name!r} "
            f"are in {', '.join(sorted(targeted)) or 'no component'}: nothing would be trained"
        )
    trained = targeted & reachable if needs <= {"text"} else reachable
    encoders = tuple(encoder for encoder in backend.encoders if encoder in trained)
    asked_for = {component for need in all_needs for component in backend.reaches[need]}
    load = trained if all_needs <= {"text"} else trained | asked_for
    if config.prompt_2 is not None and not set(encoders) & set(backend.encoders[1:]):
        raise ObjectiveError("prompt_2: no second text encoder is in use that would read it")
    return tuple(component for component in backend.components if component in load), encoders


def _backend(
    registry: Registry, config: RunConfig, model: ModelConfig | None, base_model: str | None, problems: list[Problem]
) -> Chosen | None:
    """The backend that the model config names, or the one that recognizes the base model."""
    if model is None:
        return None
    name = model.backend
    if name is None:
        if not base_model:  # a mistake of its own, told where base models are read
            return None
        if base_model == IN_MEMORY:
            problems.append(Problem("backend", f"model config {model.name!r} names none; give one"))
            return None
        try:
            name = recognized_backend(base_model, registry)
        except LoraForgeError as error:
            problems.append(Problem("backend", str(error)))
            return None
    return choose(registry, "backend", Choice(name, config.backend_options), problems)


def _first(*candidates: Any) -> Any:
    return next(value for value in candidates if value is not None)


def _named_file(path: Path | None) -> str | None:
    """A file's name and digest; of a folder of PEFT's, the digest of what its adapters say and hold."""
    if path is None:
        return None
    inner = (one for pattern in ("adapter_*", "*/adapter_*") for one in path.glob(pattern) if one.is_file())
    adapters = sorted(inner) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for one in adapters:
        if path.is_dir():
            digest.update(f"{one.relative_to(path).as_posix()}\0{one.stat().st_size}\0".encode())
        digest.update(one.read_bytes())
    return f"{path.name} sha256:{digest.hexdigest()}"
