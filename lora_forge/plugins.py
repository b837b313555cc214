"""Discovery of plugins, resolution of names, provenance, and what is broken and why.

Entry points are iterated here, one by one, so that a plugin that cannot be imported costs a line and
nothing else, and two distributions may use one entry-point name.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from lora_forge import hookspecs
from lora_forge.errors import PluginError, Terminated, nearest
from lora_forge.hookspecs import EXTENSION_POINTS, LIFECYCLE_EVENTS, PROJECT
from lora_forge.options import describe_options
from lora_forge.records import NEEDS, LossSpec, Spec

ENTRY_POINT_GROUP = "lora_forge"
BUILTIN = "lora-forge"
BUILTIN_MODULES = ("initializers", "losses", "optimizers", "savers", "backends")
_NAME = re.compile(r"[a-z][a-z0-9_-]*\Z")


@dataclass(frozen=True)
class Plugin:
    """One plugin module: `id` is `distribution:entry`; `error` says why it is broken, or is None."""

    id: str
    distribution: str
    version: str
    module: str
    error: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Supplied:
    """A spec and the plugin that supplied it."""

    spec: Spec
    plugin: Plugin

    @property
    def is_builtin(self) -> bool:
        return self.plugin.distribution == BUILTIN

    @property
    def qualified_name(self) -> str:
        """`dist:name`, the name that is never ambiguous between distributions."""
        return f"{self.plugin.distribution}:{self.spec.name}"

    def provenance(self) -> dict[str, str]:
        """Who supplied it, as written into a file's metadata."""
        return {
            "kind": self.spec.kind,
            "name": self.spec.name,
            "distribution": self.plugin.distribution,
            "version": self.plugin.version,
            "module": self.plugin.module,
        }


@dataclass
class Registry:
    """All plugins of this process. Build one with `discover`."""

    plugins: list[Plugin] = field(default_factory=list)
    supplied: dict[str, list[Supplied]] = field(default_factory=lambda: {kind: [] for kind in EXTENSION_POINTS})
    _manager: pluggy.PluginManager = field(default_factory=lambda: _new_manager())

    @property
    def broken(self) -> list[Plugin]:
        return [plugin for plugin in self.plugins if plugin.error]

    def add(self, plugin: Plugin, load: Callable[[], Any]) -> Plugin:
        """Import, check and register one plugin; whatever it raises is recorded, never raised."""
        start = time.perf_counter()
        try:
            module = load()
            _check_hooks(module)
            self._manager.register(module, name=plugin.id)
            plugin = replace(plugin, module=getattr(module, "__name__", plugin.module))
            fresh = list(self._collect(plugin))
        except (KeyboardInterrupt, Terminated):
            raise
        except BaseException as error:
            if self._manager.has_plugin(plugin.id):
                self._manager.unregister(name=plugin.id)
            plugin = replace(plugin, error=_one_line(error))
            fresh = []
        plugin = replace(plugin, seconds=time.perf_counter() - start)
        self.plugins.append(plugin)
        for spec in fresh:
            self.supplied[spec.kind].append(Supplied(spec, plugin))
        return plugin

    def observe(self, observer: Any, name: str) -> None:
        """Register an object with lifecycle hooks, such as a progress display."""
        _check_hooks(observer)
        self._manager.register(observer, name=name)

    def notify(self, hook_name: str, event: Any) -> list[str]:
        """Call each observer of a lifecycle event singly; return what went wrong, one line each."""
        failures = []
        for implementation in getattr(self._manager.hook, hook_name).get_hookimpls():
            try:
                implementation.function(*([event] if implementation.argnames else []))
            except (Exception, SystemExit) as error:
                failures.append(f"{implementation.plugin_name} failed in {hook_name}: {_one_line(error)}")
        return failures

    def candidates(self, kind: str, name: str) -> list[Supplied]:
        """Every spec that goes by a name, or by `dist:name`."""
        distribution, _, bare = name.rpartition(":")
        return [
            one
            for one in self.supplied[kind]
            if one.spec.name == bare and (not distribution or _same_distribution(one.plugin.distribution, distribution))
        ]

    def resolve(self, kind: str, name: str) -> Supplied:
        """The spec a name means: a built-in always wins a bare name; `dist:name` picks a distribution's.

        Raises PluginError when the name is unknown, or when two plugins supply it.
        """
        candidates = self.candidates(kind, name)
        builtin = [one for one in candidates if one.is_builtin]
        if builtin:
            return builtin[0]
        if len(candidates) > 1:
            choices = " or ".join(repr(one.qualified_name) for one in candidates)
            if len({one.qualified_name for one in candidates}) == 1:
                choices = f"uninstalling one of {', '.join(one.plugin.id for one in candidates)}"
            raise PluginError(f"{len(candidates)} plugins supply the {kind} {name!r}; say which: {choices}")
        if not candidates:
            raise PluginError(self._unknown(kind, name))
        return candidates[0]

    def _unknown(self, kind: str, name: str) -> str:
        known = [one.qualified_name if ":" in name else one.spec.name for one in self.supplied[kind]]
        before, _, last = name.rpartition(":")
        if any(before in (one.spec.name, one.qualified_name) for one in self.supplied[kind]):
            return f"{kind} {before!r}: {last!r} is neither a weight nor a name"
        return f"unknown {kind} {name!r}{nearest(name, known)}{self.suspects(name)}"

    def suspects(self, name: str) -> str:
        """The broken plugins an unknown name may have come from, one line each; of its distribution if it names one."""
        distribution = name.rpartition(":")[0]
        return "".join(
            f"\n  it may have come from {plugin.id}, which is broken: {plugin.error}"
            for plugin in self.broken
            if not distribution or _same_distribution(plugin.distribution, distribution)
        )

    def _collect(self, plugin: Plugin) -> Iterable[Spec]:
        seen: set[tuple[str, str]] = set()
        for hook_name, spec_type in EXTENSION_POINTS.values():
            for implementation in getattr(self._manager.hook, hook_name).get_hookimpls():
                if implementation.plugin_name != plugin.id:
                    continue
                # Materialised here: an exception in a generator surfaces while iterating.
                for spec in list(implementation.function()):
                    _check_spec(spec, spec_type, hook_name)
                    if (spec.kind, spec.name) in seen:
                        raise PluginError(f"{hook_name} yields {spec.name!r} twice")
                    seen.add((spec.kind, spec.name))
                    yield spec


def discover(files: Sequence[Path] = ()) -> Registry:
    """Built-ins, then every installed plugin, then plugin files given by the user.

    Raises PluginError for a file that cannot be used, since it was asked for by name; an installed
    plugin that is broken is recorded in `Registry.broken`.
    """
    registry = Registry()
    version = _own_version()
    for name in BUILTIN_MODULES:
        module = f"lora_forge.builtin.{name}"
        registry.add(
            Plugin(f"{BUILTIN}:{name}", BUILTIN, version, module), functools.partial(importlib.import_module, module)
        )
    for plugin, load in sorted(_installed(), key=lambda one: one[0].id):
        registry.add(plugin, load)
    for path in files:
        _add_file(registry, path)
    return registry


def build(supplied: Supplied, options: Any) -> Callable[..., Any]:
    """The callable a spec's factory makes with these options. This is where heavy imports happen.

    Raises PluginError when the factory cannot be imported or constructed.
    """
    spec = supplied.spec
    factory: Any = spec.factory
    try:
        if isinstance(factory, str):
            module_name, _, attribute = factory.partition(":")
            factory = getattr(importlib.import_module(module_name), attribute)
        if inspect.isclass(factory):
            constructor: Callable[..., Any] = factory
            made: Callable[..., Any] = constructor(*([options] if inspect.signature(constructor).parameters else []))
            return made
        function: Callable[..., Any] = factory
        if "options" in inspect.signature(function).parameters:
            return functools.partial(function, options=options)
        return function
    except (Exception, SystemExit) as error:
        raise PluginError(f"{spec.kind} {supplied.qualified_name!r} cannot be built: {_one_line(error)}") from error


def _new_manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    return manager


def _installed() -> Iterator[tuple[Plugin, Callable[[], Any]]]:
    """Every entry point of the group. Distributions are read one by one: an unreadable one hides no other."""
    seen: set[tuple[str, str]] = set()
    for distribution in importlib.metadata.distributions():
        try:
            entries = [(e.name, e.value, e.load) for e in distribution.entry_points.select(group=ENTRY_POINT_GROUP)]
        except Exception as error:
            entries = [("entry_points.txt", "", functools.partial(_raise, error))]
        for entry_name, value, load in entries:
            name, version = _name_and_version(distribution)
            if (name, entry_name) not in seen:  # the first on the path is the one Python imports
                seen.add((name, entry_name))
                yield Plugin(f"{name}:{entry_name}", name, version, value), load


def _name_and_version(distribution: importlib.metadata.Distribution) -> tuple[str, str]:
    try:
        return distribution.name or "unknown", distribution.version or "unknown"
    except Exception:  # metadata that is missing or unreadable
        return "unknown", "unknown"


def _raise(error: Exception) -> None:
    raise error


def _add_file(registry: Registry, path: Path) -> None:
    if not os.path.isfile(path):
        raise PluginError(f"plugin file {str(path)!r} does not exist")
    if any(plugin.id == f"{path.stem}:file" for plugin in registry.plugins):
        raise PluginError(f"plugin file {str(path)!r}: another plugin file is named {path.stem!r} too")
    module_name = f"lora_forge_file_{path.stem}"
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise PluginError(f"plugin file {str(path)!r} cannot be read: {error.strerror}") from error

    def load() -> ModuleType:
        spec = importlib.util.spec_from_file_location(module_name, path)
        if spec is None or spec.loader is None:
            raise PluginError("not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
        return module

    # The distribution of a file is its stem, the version its content: no path leaves this machine.
    added = registry.add(Plugin(f"{path.stem}:file", path.stem, f"sha256:{digest}", path.name), load)
    if added.error:
        raise PluginError(f"plugin file {str(path)!r}: {added.error}")


def _check_hooks(module: Any) -> None:
    """Hooks no release has ever known are mistakes; pluggy alone would stay silent."""
    known = [hook for hook, _ in EXTENSION_POINTS.values()] + list(LIFECYCLE_EVENTS)
    parser = pluggy.PluginManager(PROJECT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in dir(module):
            options = parser.parse_hookimpl_opts(module, name)
            if options is None:
                value = getattr(module, name, None)
                if inspect.isfunction(value) and name in known and value.__module__ == getattr(module, "__name__", ""):
                    raise PluginError(f"{name} is not marked with @hookimpl")
            elif name not in known and not options.get("optionalhook"):
                raise PluginError(f"unknown hook {name!r}{nearest(name, known)}")


def _check_spec(spec: Any, spec_type: type[Spec], hook_name: str) -> None:
    if not isinstance(spec, spec_type):
        raise PluginError(f"{hook_name} yields {type(spec).__name__}, expected {spec_type.__name__}")
    if not isinstance(spec.name, str) or not _NAME.match(spec.name):
        raise PluginError(f"{hook_name} yields a bad name {spec.name!r}: lower-case letters, digits, '_' and '-'")
    if not isinstance(spec.options, type) or not is_dataclass(spec.options):
        raise PluginError(f"{spec.name}: options must be a dataclass type")
    for text in ("summary", "formula", "source", "suffix"):
        if not isinstance(getattr(spec, text, ""), str):
            raise PluginError(f"{spec.name}: {text} must be text, got {getattr(spec, text)!r}")
    describe_options(spec.options)  # raises where a type or a default cannot be evaluated
    if isinstance(spec.factory, str) and not re.match(r"[\w.]+:\w+\Z", spec.factory):
        raise PluginError(f"{spec.name}: factory must be 'package.module:Name', got {spec.factory!r}")
    if not isinstance(spec.factory, str) and not callable(spec.factory):
        raise PluginError(f"{spec.name}: factory is neither a dotted string nor a callable")
    if isinstance(spec, LossSpec) and not callable(spec.needs):
        if isinstance(spec.needs, str):
            raise PluginError(f"{spec.name}: needs must be a set of words, got {spec.needs!r}")
        for need in spec.needs:
            if need not in NEEDS:
                raise PluginError(f"{spec.name}: unknown need {need!r}{nearest(need, NEEDS)}")


def _same_distribution(one: str, other: str) -> bool:
    return re.sub(r"[-_.]+", "-", one).lower() == re.sub(r"[-_.]+", "-", other).lower()


def _own_version() -> str:
    from lora_forge import __version__

    return __version__


def _one_line(error: BaseException) -> str:
    try:
        text = " ".join(str(error).split())
    except Exception:  # an error that cannot say what it is
        text = ""
    return text if isinstance(error, PluginError) else f"{type(error).__name__}: {text}".rstrip(": ")
