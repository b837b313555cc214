"""Which backend knows a base model, or a LoRA file, where nobody has named one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from lora_forge.builtin.backends import lora_forge_backends
from lora_forge.errors import LoraForgeError, ModelError
from lora_forge.files.family import recorded_family
from lora_forge.files.lora_file import LoraFile, open_lora
from lora_forge.plugin_rules import one_line
from lora_forge.plugins import Registry, Supplied, attribute_named
from lora_forge.records import BackendSpec

OpenRegistry = Callable[[], Registry]  # called when a plugin may be needed: most files are of families that ship
_SHIPPED = {spec.name: spec for spec in lora_forge_backends()}
_FILED_BY = ("ss_base_model_version", "modelspec.architecture")
_HOW = "(models new --backend, or 'backend' in the model config)"


def recognized_backend(base_model: str, registry: Registry) -> str:
    """The name of the one backend that recognizes `base_model`; `dist:name` where the bare name is ambiguous.

    Raises ModelError, with each backend's reason, when none does or several do.
    """
    found: list[Supplied] = []
    reasons: dict[str, list[str]] = {}  # each with the backends that give it
    for supplied in registry.supplied["backend"]:
        reason = _why_not(cast(BackendSpec, supplied.spec), base_model)
        if reason is None:
            found.append(supplied)
        else:
            reasons.setdefault(reason, []).append(_shortest_name(supplied, registry))
    if len(found) == 1:
        return _shortest_name(found[0], registry)
    if found:
        names = " or ".join(repr(one.qualified_name) for one in found)
        raise ModelError(f"several backends recognize base model {base_model!r}; say which {_HOW}: {names}")
    told = [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
    if len(told) == 1:
        raise ModelError(f"no backend recognizes base model {base_model!r}; {told[0]}")
    lines = "".join(f"\n  {line}" for line in told)
    raise ModelError(f"no backend recognizes base model {base_model!r}; name one that knows it {_HOW}{lines}")


def _why_not(spec: BackendSpec, base_model: str) -> str | None:
    """Why a backend does not recognize a base model, in one line; None if it does."""
    if spec.recognizes is None:
        return "recognizes none by itself"
    try:
        recognizes: Callable[[str], bool] = attribute_named(spec.recognizes)
        return None if recognizes(base_model) else "not one of its models"
    except LoraForgeError as error:
        return " ".join(str(error).split())
    except (Exception, SystemExit) as error:  # a plugin's own, of no common type
        return one_line(error)


def _shortest_name(supplied: Supplied, registry: Registry) -> str:
    """The name that means this backend and no other: a built-in always wins a bare one."""
    alone = supplied.is_builtin or len(registry.candidates("backend", supplied.spec.name)) == 1
    return supplied.spec.name if alone else supplied.qualified_name


@dataclass(frozen=True)
class Family:
    """What a LoRA file is a LoRA of.

    name: as `--family` takes it, None where nothing in the file tells. spec: of the backend that knows the family, None
    where there is none here. recorded: whether the file's own record named it. told_as: what a file's metadata calls it
    under `FAMILY_KEY`: by its distribution too where it does not ship.
    """

    name: str | None
    spec: BackendSpec | None = None
    recorded: bool = False
    told_as: str | None = None

    @property
    def missing(self) -> bool:
        """Whether the backend that the file was made with is not here. It is never looked for elsewhere."""
        return self.recorded and self.spec is None

    def __str__(self) -> str:
        known = self.name or "not known"
        return f"{known}, of a backend that is not installed here" if self.missing else known


def open_known(path: Path, registry: OpenRegistry) -> tuple[LoraFile, Family]:
    """A LoRA file, its layers named as its family names them, and that family: by record, metadata, then layers.

    registry: plugins are loaded because the user has them, never because a file names one. Raises LoraFileError as
    `open_lora` does.
    """
    lora = open_lora(path)
    family = _family_of(lora, registry)
    layout = family.spec.layout if family.spec else None
    if layout and family.name not in _SHIPPED:
        lora = open_lora(path, {prefix: component for component, prefix in layout.prefixes.items()})
    return lora, family


def named_family(name: str, registry: OpenRegistry) -> Family:
    """The family of a backend here. Raises PluginError for a name that none of them has."""
    if name in _SHIPPED:
        return Family(name, _SHIPPED[name])
    there = registry()
    return _of_plugin(there.resolve("backend", name), there)


def families_here(registry: OpenRegistry) -> list[Family]:
    """Those of all backends here."""
    there = registry()
    return [_of_plugin(one, there) for one in there.supplied["backend"]]


def _family_of(lora: LoraFile, registry: OpenRegistry) -> Family:
    recorded = recorded_family(lora.metadata)
    if recorded in _SHIPPED:
        return Family(recorded, _SHIPPED[recorded], recorded=True)
    if recorded:
        there = registry()
        found = there.candidates("backend", recorded)
        return replace(_of_plugin(found[0], there), recorded=True) if len(found) == 1 else Family(recorded, None, True)
    filed = [(key, lora.metadata[key]) for key in _FILED_BY if lora.metadata.get(key)]
    if filed and not _filed_as(filed, [Family(*one) for one in _SHIPPED.items()]):
        for plugin in _filed_as(filed, families_here(registry)):
            return plugin
    return Family(lora.family, _SHIPPED.get(lora.family or ""))


def _of_plugin(supplied: Supplied, registry: Registry) -> Family:
    name, spec = _shortest_name(supplied, registry), cast(BackendSpec, supplied.spec)
    return Family(name, spec, told_as=None if supplied.is_builtin else supplied.qualified_name)


def _filed_as(filed: Sequence[tuple[str, str]], families: Sequence[Family]) -> list[Family]:
    """The family that other programs know these files' metadata for; none where it is that of several."""
    found = [
        one
        for one in families
        if one.spec and one.spec.layout and any(one.spec.layout.metadata.get(key) == text for key, text in filed)
    ]
    return found if len(found) == 1 else []
