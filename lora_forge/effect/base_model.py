"""The base model that a LoRA file belongs to, and the file's layers of that model's text encoders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

from lora_forge.choices import Chosen
from lora_forge.config.model import read_model_config, shipped_names
from lora_forge.contracts import Backend, BackendRequest, LayerKey
from lora_forge.errors import ConfigError, LoraFileError, ModelError, blaming, printable
from lora_forge.files import family
from lora_forge.files.layer_tensors import LayerTensors, read_layer, unnamed_problem
from lora_forge.files.lora_file import FileLayer, LoraFile
from lora_forge.files.names import own_names
from lora_forge.options import parse_options
from lora_forge.plan import IN_MEMORY
from lora_forge.plugins import BUILTIN, Registry
from lora_forge.recognition import recognized_backend
from lora_forge.records import BackendSpec

USUAL = {"sdxl": "sdxl_base", "sd15": "sd15"}  # model configs, by family


@dataclass(frozen=True)
class FileBase:
    """A base model and the backend that knows it. recorded: the file's own record named it, nobody here."""

    base_model: str
    backend: Chosen
    recorded: bool

    @property
    def spec(self) -> BackendSpec:
        return cast(BackendSpec, self.backend.supplied.spec)

    def open(self, device: str, dtype: str) -> Backend:
        """The backend on this model, nothing of it loaded. Raises ModelError for one that is not there."""
        try:
            with blaming(f"backend {self.backend.name!r}"):
                return self.backend.build()(BackendRequest(self.base_model, device, dtype))  # type: ignore[no-any-return]
        except ModelError as error:
            if not self.recorded:
                raise
            raise ModelError(f"{error} (the file's record names it; --base-model says where it is)") from error


def recorded_run(lora: LoraFile) -> Mapping[str, Any]:
    """What a file's record says of the run that made it; empty without one, or where it is not legible."""
    return family.recorded_run(lora.metadata)


def base_of(
    lora: LoraFile,
    registry: Registry,
    *,
    model: str | None = None,
    base_model: str | None = None,
    backend_options: Mapping[str, Any] | None = None,
) -> FileBase:
    """The base model of a file.

    model: a model config to take backend and base model from, instead of the file's record or its family's usual one.
    base_model: where the weights are, instead of what that says. backend_options: win over the recorded ones.
    Raises ModelError where nothing tells, ConfigError for options, PluginError for a backend that is missing.
    """
    name, source, options = (None, None, {}) if model else _recorded(recorded_run(lora), registry)
    recorded = source is not None and base_model is None
    if name is None:
        config_name = model or USUAL.get(lora.family or "")
        if config_name:
            config = read_model_config(config_name)
            name, source = config.backend, config.base_model
    source = base_model or source
    if not source:
        told = f"a LoRA of family {lora.family}" if lora.family else "a LoRA of a family that nothing in it tells"
        raise ModelError(
            f"{str(lora.path)!r} is {told}; --model or --base-model says which base model to measure it on"
        )
    supplied = registry.resolve("backend", name or recognized_backend(source, registry))
    parsed, mistakes = parse_options(
        supplied.spec.options, {**options, **(backend_options or {})}, key=supplied.spec.name
    )
    if mistakes:
        raise ConfigError("", mistakes)
    return FileBase(source, Chosen(supplied, parsed), recorded)


def _recorded(run: Mapping[str, Any], registry: Registry) -> tuple[str | None, str | None, dict[str, Any]]:
    """The backend's name, the base model and the backend's options in a record; a path there is no path here."""
    backend, source = run.get("backend"), run.get("base_model")
    if not isinstance(backend, dict) or not isinstance(source, str) or not source:
        return None, None, {}
    name, distribution = str(backend.get("name")), str(backend.get("distribution"))
    name = name if distribution == BUILTIN else f"{distribution}:{name}"
    if not registry.candidates("backend", name):
        raise ModelError(
            f"the backend {printable(name)!r} that it was made with is not here; --model names another's model config"
        )
    if source == IN_MEMORY:
        shipped = run.get("model") in shipped_names()
        source = read_model_config(str(run["model"])).base_model if shipped else None
    hints = get_type_hints(registry.resolve("backend", name).spec.options)
    given = backend.get("options")
    options = {
        key: value
        for key, value in (given.items() if isinstance(given, dict) else ())
        if value is not None and key in hints and Path not in (hints[key], *get_args(hints[key]))
    }
    return name, source, options


def split_layers(lora: LoraFile, spec: BackendSpec) -> tuple[list[FileLayer], dict[str, int]]:
    """The layers that are of text encoders, or whose names do not say; and how many are of each other component.

    Raises LoraFileError for a file that is no whole LoRA, or that is of another family.
    """
    where = repr(str(lora.path))
    if not lora.layers:
        raise LoraFileError(f"{where} holds no LoRA layer")
    if lora.faults:
        raise LoraFileError(f"{where}: {lora.faults[0]}")
    if problem := unnamed_problem(lora):
        raise LoraFileError(problem)
    for layer in lora.layers:
        if layer.component is not None and layer.component not in spec.components:
            raise LoraFileError(
                f"{where}: {printable(layer.name)!r} is of {layer.component}, which a model of backend {spec.name!r} "
                f"has not; it has {', '.join(spec.components)}. Is it a LoRA of another family? --model says which"
            )
    others = [one.component for one in lora.layers if one.component and one.component not in spec.encoders]
    maybe = [one for one in lora.layers if not one.component or one.component in spec.encoders]
    return maybe, dict(Counter(others))


def read_encoder_layers(
    lora: LoraFile, maybe: Sequence[FileLayer], base: FileBase, sizes: Mapping[str, Mapping[str, tuple[int, int]]]
) -> tuple[dict[LayerKey, LayerTensors], dict[str, int]]:
    """The text encoders' layers, in the model's order, and how many are of each other component after all.

    maybe: what `split_layers` gave. sizes: the backend's `architecture()`. Raises LoraFileError for layers that are
    no plain LoRA, or not of this model.
    """
    names = own_names([(component, name) for component in sizes for name in sizes[component]], base.spec.layout)
    found: dict[LayerKey, LayerTensors] = {}
    others: Counter[str] = Counter()
    for layer in maybe:
        key = (layer.component or "", layer.layer or "")
        size = sizes.get(key[0], {}).get(key[1])
        if size is None and layer.name in names:
            key = names[layer.name]
            size = sizes[key[0]][key[1]]
        if size is None:
            raise LoraFileError(_foreign(lora, layer, base))
        if key[0] not in base.spec.encoders:
            others[key[0]] += 1
            continue
        if not layer.is_plain:
            raise LoraFileError(
                f"{str(lora.path)!r}: {printable(layer.name)!r} is of the kind {printable(layer.kind)!r}; the effect "
                "of plain LoRA layers alone is measured, and without it the numbers would not be the file's"
            )
        if layer.shape != size or len(layer.parts["down"].stored.shape) != 2:
            raise LoraFileError(_foreign(lora, layer, base, size))
        found[key] = read_layer(lora, layer)
    order = {(component, name): None for component in sizes for name in sizes[component]}
    return {key: found[key] for key in order if key in found}, dict(others)


def _foreign(lora: LoraFile, layer: FileLayer, base: FileBase, size: tuple[int, int] | None = None) -> str:
    shown = f" {list(layer.shape)}" if layer.shape else ""
    why = f"where the layer of base model {base.base_model!r} is {list(size)}" if size else "which is no linear layer"
    of = "" if size else f" of base model {base.base_model!r}"
    return f"{str(lora.path)!r}: {printable(layer.name)!r} is{shown}, {why}{of}; --model and --base-model say another"
