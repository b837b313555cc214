"""What a run is asked for, as data: read from a run config, changed key by key, given to `Session.run`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lora_forge.errors import UsageError, nearest
from lora_forge_optuna.keys import CHOSEN, Key

DEFAULT_LOSS = "embedding_magnitude"
OF_THE_SWEEP = ("prompt", "prompt_2", "seed", "output")
OF_THE_MODEL = ("model", "base_model", "device", "dtype", "backend_options", "plugins", "strict_plugins")


def refuse_own(key: Key) -> None:
    """Raises UsageError for what is the sweep's own."""
    if key.kind in OF_THE_SWEEP:
        raise UsageError(f"{key}: this is the sweep's own to say; leave it out")


@dataclass(frozen=True)
class Plugin:
    """A plugin by name ("": lora-forge's default), and its options. weight, schedule: of a loss, where given."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    weight: float | None = None
    schedule: str | None = None

    @classmethod
    def read(cls, value: Any, kind: str) -> Plugin:
        """From a name, which of a loss may carry `:WEIGHT` and `@SCHEDULE`, or a run config's table of these."""
        table: Any = {"name": value} if isinstance(value, str) else value
        if not isinstance(table, Mapping) or not isinstance(table.get("name", ""), str):
            raise UsageError(f"{kind}: expected a name or a table, got {value!r}")
        name, weight, schedule = table.get("name", ""), None, None
        if kind in ("loss", "measure"):
            name, _, schedule = name.partition("@")
            front, _, last = name.rpartition(":")
            try:
                name, weight = (front, float(last)) if front else (name, None)
            except ValueError:  # `dist:name`
                pass
        known = ("name", "options", "weight", "schedule")
        unknown = [key for key in table if key not in known]
        if unknown:
            raise UsageError(f"{kind}.{unknown[0]}: unknown key{nearest(unknown[0], known)}")
        return cls(
            name, dict(table.get("options", {})), table.get("weight", weight), table.get("schedule", schedule or None)
        )

    def with_option(self, option: str, value: Any) -> Plugin:
        return replace(self, options={**self.options, option: value})

    def as_table(self) -> dict[str, Any]:
        """As a run config has it, without what is not said."""
        said = {"name": self.name, "weight": self.weight, "schedule": self.schedule, "options": dict(self.options)}
        return {key: value for key, value in said.items() if value not in (None, "", {})}


@dataclass(frozen=True)
class Settings:
    """A run config without its prompt: plugins by kind, and all other keys as they are."""

    plugins: Mapping[str, tuple[Plugin, ...]]
    scalars: Mapping[str, Any]

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Settings:
        """From a run config's mapping. Raises UsageError for what belongs to the sweep itself."""
        for key in config:
            refuse_own(Key(key))
        plugins = {
            kind: tuple(Plugin.read(one, kind) for one in (value if isinstance(value, list | tuple) else [value]))
            for kind in (*CHOSEN, "measure")
            if (value := config.get(kind)) is not None
        }
        losses = {"loss": (Plugin(DEFAULT_LOSS),)}
        return cls({**losses, **plugins}, {key: value for key, value in config.items() if key not in plugins})

    def having(self, given: Iterable[tuple[Key, Any]]) -> Settings:
        """With these values: names of plugins first, then options of those chosen. Options of others are idle."""
        result = self
        for key, value in sorted(given, key=lambda pair: bool(pair[0].owner or pair[0].option)):
            result = result._with_one(key, value)
        return result

    def chosen(self, key: Key) -> list[int]:
        """Which plugins a key is about; none where its owner is not chosen. Raises UsageError where it could be two."""
        plugins = self.plugins.get("loss" if key.kind == "weight" else key.kind, (Plugin(""),))
        owners = [index for index, one in enumerate(plugins) if not key.owner or one.name == key.owner]
        if len(owners) > 1:
            names = ", ".join(plugins[index].name for index in owners)
            raise UsageError(f"{key}: there is {names}; say whose it is, as {key.kind}.NAME.{key.option}")
        return owners

    def as_run_config(self) -> dict[str, Any]:
        """The mapping, ready for TOML and for `lora_forge.load`."""
        several = {kind: [one.as_table() for one in self.plugins.get(kind, ())] for kind in ("loss", "measure")}
        single = {kind: some[0].as_table() for kind, some in self.plugins.items() if kind not in several}
        return {**self.scalars, **{kind: value for kind, value in {**several, **single}.items() if value}}

    def for_session(self) -> dict[str, Any]:
        """As `Session.run` takes it, which has the rest from `load`."""
        return {key: value for key, value in self.as_run_config().items() if key not in OF_THE_MODEL}

    def _with_one(self, key: Key, value: Any) -> Settings:
        if not key.owner and not key.option:
            if key.kind not in (*CHOSEN, "measure"):
                refuse_own(key)
                return replace(self, scalars={**self.scalars, key.kind: value})
            return replace(self, plugins={**self.plugins, key.kind: self._renamed(key.kind, value)})
        kind = "loss" if key.kind == "weight" else key.kind
        plugins = list(self.plugins.get(kind, (Plugin(""),)))
        for index in self.chosen(key):
            one = plugins[index]
            plugins[index] = replace(one, weight=value) if key.kind == "weight" else one.with_option(key.option, value)
        return replace(self, plugins={**self.plugins, kind: tuple(plugins)})

    def _renamed(self, kind: str, value: Any) -> tuple[Plugin, ...]:
        """The plugins of a kind as newly named, with the options of before that were nobody's or had this name."""
        if not isinstance(value, str):
            raise UsageError(f"{kind}: expected a name, got {value!r}")
        before = {one.name: one.options for one in self.plugins.get(kind, ())}
        named = [Plugin.read(text.strip(), kind) for text in value.split(" + ")]
        return tuple(replace(one, options={**before.get("", {}), **before.get(one.name, {})}) for one in named)
