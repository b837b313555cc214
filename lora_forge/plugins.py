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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from lora_forge import hookspecs
from lora_forge.errors import PluginError, Terminated, nearest
from lora_forge.hookspecs import EXTENSION_POINTS, LIFECYCLE_EVENTS, PROJECT
from lora_forge.plugin_rules import check_api, check_hooks, check_spec, one_line, reason_of
from lora_forge.records import Spec

ENTRY_POINT_GROUP = "lora_forge"
BUILTIN = "lora-forge"
BUILTIN_MODULES = ("initializers", "losses", "optimizers", "savers", "backends", "executors")
# Packages that listing plugins does not need: a plugin that imports one at its own import is named for it.
HEAVY = ("torch", "transformers", "diffusers", "peft")


@dataclass(frozen=True)
class Plugin:
    """One plugin module: `id` is `distribution:entry`; `error` says why it is broken, or is None.

    module: its dotted name, or the name of the file.
    seconds: what its import took. heavy: the heavy packages that were imported by it.
    """

    id: str
    distribution: str
    version: str
    module: str
    error: str | None = None
    seconds: float = 0.0
    heavy: tuple[str, ...] = ()


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
        start, light = time.perf_counter(), [name for name in HEAVY if name not in sys.modules]
        try:
            with redirect_stdout(sys.stderr):  # stdout holds what a command was asked for, and nothing of a plugin's
                module = _traced(f"import {plugin.id}", load)
                check_api(module)
                check_hooks(module)
                self._manager.register(module, name=plugin.id)
                fresh = list(self._collect(plugin))
        except (KeyboardInterrupt, Terminated):
            raise
        except BaseException as error:
            if self._manager.has_plugin(plugin.id):
                self._manager.unregister(name=plugin.id)
            plugin = replace(plugin, error=reason_of(error))
            fresh = []
        heavy = tuple(name for name in light if name in sys.modules)
        plugin = replace(plugin, seconds=time.perf_counter() - start, heavy=heavy)
        self.plugins.append(plugin)
        for spec in fresh:
            self.supplied[spec.kind].append(Supplied(spec, plugin))
        return plugin

    def observe(self, observer: Any, name: str) -> None:
        """Register an object with lifecycle hooks, such as a progress display."""
        check_hooks(observer)
        self._manager.register(observer, name=name)

    def notify(self, hook_name: str, event: Any) -> list[str]:
        """Call each observer of a lifecycle event singly; return what went wrong, one line each."""
        failures = []
        known = {"event": event}
        for implementation in getattr(self._manager.hook, hook_name).get_hookimpls():
            try:
                # An observer is given what it asks for by name, so that a hook can gain arguments.
                given = [known[name] for name in implementation.argnames]
                _traced(f"{hook_name} of {implementation.plugin_name}", implementation.function, *given)
            except (Exception, SystemExit) as error:
                failures.append(f"{implementation.plugin_name} failed in {hook_name}: {one_line(error)}")
        return failures

    def candidates(self, kind: str, name: str) -> list[Supplied]:
        """Every spec that goes by a name, or by `dist:name`."""
        distribution, _, bare = name.rpartition(":")
        named = [one for one in self.supplied[kind] if one.spec.name == bare]
        if not distribution:
            return named
        # A plugin file may differ from an installed distribution by a hyphen: its own spelling means it alone.
        exact = [one for one in named if one.plugin.distribution == distribution]
        return exact or [one for one in named if _same_distribution(one.plugin.distribution, distribution)]

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
            raise PluginError(self._unknown(kind, [kind], name))
        return candidates[0]

    def find(self, name: str, kind: str | None = None) -> list[Supplied]:
        """What a name means, of any kind or of one; a name may be used once per kind. Raises PluginError."""
        kinds = [kind] if kind else list(EXTENSION_POINTS)
        found = [self.resolve(one, name) for one in kinds if self.candidates(one, name)]
        if not found:
            raise PluginError(self._unknown(kind or "plugin", kinds, name))
        return found

    def observers(self) -> list[tuple[Plugin, tuple[str, ...]]]:
        """Plugins that observe lifecycle events, and which."""
        found = []
        for plugin in self.plugins:
            module = self._manager.get_plugin(plugin.id)
            callers = self._manager.get_hookcallers(module) if module is not None else None
            hooks = tuple(caller.name for caller in callers or () if caller.name in LIFECYCLE_EVENTS)
            if hooks:
                found.append((plugin, hooks))
        return found

    def _unknown(self, what: str, kinds: Sequence[str], name: str) -> str:
        there = [one for kind in kinds for one in self.supplied[kind]]
        known = [one.qualified_name if ":" in name else one.spec.name for one in there]
        before, _, last = name.rpartition(":")
        if what == "loss" and any(before in (one.spec.name, one.qualified_name) for one in there):
            return f"{what} {before!r}: {last!r} is neither a weight nor a name"
        return f"unknown {what} {name!r}{nearest(name, known)}{self.suspects(name)}"

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
                specs = _traced(f"{hook_name} of {plugin.id}", lambda hook: list(hook()), implementation.function)
                for spec in specs:
                    check_spec(spec, spec_type, hook_name)
                    if (spec.kind, spec.name) in seen:
                        raise PluginError(f"{hook_name} yields {spec.name!r} twice")
                    seen.add((spec.kind, spec.name))
                    yield spec


def discover(files: Sequence[Path] = (), *, strict: bool = False) -> Registry:
    """Built-ins, then every installed plugin, then plugin files given by the user.

    The environment variable LORA_FORGE_PLUGINS, if set, names the installed plugins to load, by
    distribution or id, separated by commas. Raises PluginError for what was asked for by name and cannot
    be used, a file or a name in that variable; an installed plugin that is broken is recorded in
    `Registry.broken`, and raised if `strict`.
    """
    registry = Registry()
    version = _own_version()
    for name in BUILTIN_MODULES:
        module = f"lora_forge.builtin.{name}"
        registry.add(
            Plugin(f"{BUILTIN}:{name}", BUILTIN, version, module), functools.partial(importlib.import_module, module)
        )
    for plugin, load in _wanted(sorted(_installed(), key=lambda one: one[0].id)):
        registry.add(plugin, load)
    for path in files:
        _add_file(registry, path)
    if strict and registry.broken:
        lines = "".join(f"\n  {plugin.id}: {plugin.error}" for plugin in registry.broken)
        raise PluginError(f"broken plugins, and none may be (--strict-plugins):{lines}")
    return registry


def build(supplied: Supplied, options: Any) -> Callable[..., Any]:
    """The callable a spec's factory makes with these options. This is where heavy imports happen.

    Raises PluginError when the factory cannot be imported or constructed.
    """
    spec = supplied.spec
    try:
        factory: Any = attribute_named(spec.factory)
        if inspect.isclass(factory):
            constructor: Callable[..., Any] = factory
            made: Callable[..., Any] = constructor(*([options] if inspect.signature(constructor).parameters else []))
            return made
        function: Callable[..., Any] = factory
        if accepts(function, "options"):
            return functools.partial(function, options=options)
        return function
    except (Exception, SystemExit) as error:
        raise PluginError(f"{spec.kind} {supplied.qualified_name!r} cannot be built: {one_line(error)}") from error


def attribute_named(reference: str | Callable[..., Any]) -> Any:
    """What `"package.module:attribute"` names, imported; a callable is itself."""
    if not isinstance(reference, str):
        return reference
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _traced(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a plugin's function; with LORA_FORGE_TRACE=1 in the environment, say so and how long it took."""
    if os.environ.get("LORA_FORGE_TRACE", "0") in ("", "0"):
        return function(*arguments)
    start = time.perf_counter()
    try:
        return function(*arguments)
    finally:
        print(f"lora-forge: trace: {what}: {1000 * (time.perf_counter() - start):.2f} ms", file=sys.stderr)


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether a plugin's function takes a keyword; what a later release offers is only given to who asks for it."""
    return name in inspect.signature(function).parameters


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
                yield Plugin(f"{name}:{entry_name}", name, version, value.partition(":")[0].strip()), load


def _wanted(installed: list[tuple[Plugin, Callable[[], Any]]]) -> list[tuple[Plugin, Callable[[], Any]]]:
    """Those that LORA_FORGE_PLUGINS names, or all where it is not set."""
    names = os.environ.get("LORA_FORGE_PLUGINS")
    if names is None:
        return installed
    wanted = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        named = [one for one in installed if one[0].id == name or _same_distribution(one[0].distribution, name)]
        if not named:
            known = [one[0].distribution for one in installed]
            raise PluginError(f"LORA_FORGE_PLUGINS: no plugin {name!r} is installed{nearest(name, known)}")
        wanted += [one for one in named if one not in wanted]
    return wanted


def _name_and_version(distribution: importlib.metadata.Distribution) -> tuple[str, str]:
    try:
        return distribution.name or "unknown", distribution.version or "unknown"
    except Exception:  # metadata that is missing or unreadable
        return "unknown", "unknown"


def _raise(error: Exception) -> None:
    raise error


def _add_file(registry: Registry, path: Path) -> None:
    if os.path.isdir(path):
        inside = sorted(one.name for one in path.glob("*.py"))
        which = f"{str(path / inside[0])!r}" if inside else "a .py file"
        raise PluginError(f"plugin {str(path)!r} is a folder; give the file that has the hooks, such as {which}")
    if not os.path.isfile(path):
        raise PluginError(f"plugin file {str(path)!r} does not exist")
    package = path.absolute().parent.name if path.name == "__init__.py" else ""
    name = package or path.stem
    if _same_distribution(name, BUILTIN):
        raise PluginError(f"plugin file {str(path)!r}: {name!r} is the name of what ships; give it another")
    if any(plugin.id == f"{name}:file" for plugin in registry.plugins):
        raise PluginError(f"plugin file {str(path)!r}: another plugin file is named {name!r} too")
    module_name = f"lora_forge_file_{name}"
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

    # The distribution of a file is its name, the version its content: no path leaves this machine.
    added = registry.add(Plugin(f"{name}:file", name, f"sha256:{digest}", str(Path(package, path.name))), load)
    if added.error:
        raise PluginError(f"plugin file {str(path)!r}: {added.error}")


def _same_distribution(one: str, other: str) -> bool:
    return re.sub(r"[-_.]+", "-", one).lower() == re.sub(r"[-_.]+", "-", other).lower()


def _own_version() -> str:
    from lora_forge import __version__

    return __version__
