"""Options as JSON Schema (draft 2020-12), for whoever checks or edits them with tools of their own."""

from __future__ import annotations

import dataclasses
import enum
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lora_forge.options import describe_options

_PLAIN: Mapping[Any, dict[str, Any]] = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    Path: {"type": "string", "format": "path", "minLength": 1},
}
_BOUNDS = {"min": "minimum", "max": "maximum", "above": "exclusiveMinimum"}


def options_schema(options_type: type) -> dict[str, Any]:
    """The schema of an options dataclass: an object that forbids unknown keys."""
    hints = get_type_hints(options_type)
    properties, required = {}, []
    for info, field in zip(describe_options(options_type), dataclasses.fields(options_type), strict=True):
        schema = _bounded(_schema(hints[field.name]), field.metadata)
        if info.help:
            schema["description"] = info.help
        if info.required:
            required.append(info.name)
        else:
            schema["default"] = info.default
        properties[info.name] = schema
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _schema(hint: Any) -> dict[str, Any]:
    origin, arms = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return {"anyOf": [{"type": "null"} if arm is type(None) else _schema(arm) for arm in arms]}
    if origin is Literal:
        return {"enum": list(arms)}
    if origin is list or (origin is tuple and len(arms) == 2 and arms[1] is Ellipsis):
        return {"type": "array", "items": _schema(arms[0])}
    if origin is tuple:
        items = [_schema(arm) for arm in arms]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"enum": [member.value for member in hint]}
    return dict(_PLAIN.get(hint, {}))


def _bounded(schema: dict[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Bounds hold for every number in a value: on its own, in a list, or where it is optional."""
    if schema.get("type") in ("integer", "number"):
        return schema | {word: metadata[bound] for bound, word in _BOUNDS.items() if bound in metadata}
    for key in ("anyOf", "prefixItems"):
        if key in schema:
            schema[key] = [_bounded(one, metadata) for one in schema[key]]
    if "items" in schema:
        schema["items"] = _bounded(schema["items"], metadata)
    return schema
