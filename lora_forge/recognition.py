"""Which backend knows a base model, where nobody has named one: the backends are asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from lora_forge.errors import LoraForgeError, ModelError
from lora_forge.plugin_rules import one_line
from lora_forge.plugins import Registry, Supplied, attribute_named
from lora_forge.records import BackendSpec

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
