"""Examining what a name stands for, with options as a run config or command line gives them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lora_forge.errors import ConfigError
from lora_forge.options import parse_options
from lora_forge.plugins import Registry
from lora_forge.testing.checks import examine
from lora_forge.testing.examination import Examination


def examine_named(registry: Registry, name: str, kind: str | None, options: Mapping[str, Any]) -> Iterator[Examination]:
    """An examination for each plugin of that name, one per kind, of one kind if it is given.

    Raises PluginError for a name nothing goes by, ConfigError with every mistake in the options; all before the
    first examination.
    """
    found = [
        (one.spec, *parse_options(one.spec.options, options, key=one.spec.name)) for one in registry.find(name, kind)
    ]
    if problems := [problem for _, _, own in found for problem in own]:
        raise ConfigError("", problems)
    others = {kind: [one.spec for one in supplied] for kind, supplied in registry.supplied.items()}
    return (examine(spec, parsed, beside=others[spec.kind]) for spec, parsed, _ in found)
