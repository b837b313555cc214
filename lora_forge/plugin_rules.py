"""What a plugin module and the specs it yields must be; what is wrong with one is said in words."""

from __future__ import annotations

import inspect
import re
import traceback
import warnings
from collections.abc import Collection, Mapping
from dataclasses import is_dataclass
from typing import Any

import pluggy

from lora_forge import __version__
from lora_forge.errors import PluginError, nearest
from lora_forge.hookspecs import EXTENSION_POINTS, LIFECYCLE_EVENTS, PROJECT, SPOKEN_APIS
from lora_forge.options import check_declared, describe_options
from lora_forge.records import NEEDS, BackendSpec, FileLayout, LossSpec, Spec

_NAME = re.compile(r"[a-z][a-z0-9_-]*\Z")
_REFERENCE = re.compile(r"[\w.]+:\w+\Z")
_API = "__lora_forge_api__"
_UNSAID = 1  # a module that does not say which API it is for was written for the first


def check_api(module: Any) -> None:
    """Raises PluginError for a module built for a plugin API this release does not speak."""
    api = getattr(module, _API, _UNSAID)
    if api not in SPOKEN_APIS:
        raise PluginError(_foreign(api))


def reason_of(error: BaseException) -> str:
    """Why a plugin could not be loaded, in one line.

    An import that fails in a module built for another plugin API fails because of that.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        api = frame.f_globals.get(_API, _UNSAID)
        if _API in frame.f_globals and api not in SPOKEN_APIS:
            return _foreign(api)
    return one_line(error)


def _foreign(api: Any) -> str:
    spoken = ", ".join(map(str, SPOKEN_APIS))
    newer = isinstance(api, int) and api > SPOKEN_APIS[-1]
    remedy = "a newer lora-forge" if newer else "another version of the plugin"
    return f"built for plugin API {api!r}; lora-forge {__version__} speaks {spoken}: install {remedy}"


def check_hooks(module: Any) -> None:
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
                continue
            hook = options.get("specname") or name
            if hook not in known and not options.get("optionalhook"):
                raise PluginError(f"unknown hook {hook!r}{nearest(hook, known)}")
            if options.get("wrapper") or options.get("hookwrapper"):
                raise PluginError(f"{name} is a wrapper, which would never run: hooks are called one by one")


def check_spec(spec: Any, spec_type: type[Spec], hook_name: str) -> None:
    if not isinstance(spec, spec_type):
        raise PluginError(f"{hook_name} yields {type(spec).__name__}, expected {spec_type.__name__}")
    if not isinstance(spec.name, str) or not _NAME.match(spec.name):
        raise PluginError(f"{hook_name} yields a bad name {spec.name!r}: lower-case letters, digits, '_' and '-'")
    if not isinstance(spec.options, type) or not is_dataclass(spec.options):
        raise PluginError(f"{spec.name}: options must be a dataclass type")
    for text in ("summary", "formula", "source", "suffix", "tiny"):
        if not isinstance(getattr(spec, text, ""), str):
            raise PluginError(f"{spec.name}: {text} must be text, got {getattr(spec, text)!r}")
    describe_options(spec.options)  # raises where a type or a default cannot be evaluated
    check_declared(spec.options, spec.name)
    _check_reference(spec, "factory")
    for field in ("reader", "recognizes"):
        if getattr(spec, field, None) is not None:
            _check_reference(spec, field)
    if isinstance(spec, BackendSpec):
        _check_backend(spec)
    if isinstance(spec, LossSpec) and spec.tokens not in ("all", "content"):
        raise PluginError(f"{spec.name}: tokens must be 'all' or 'content', got {spec.tokens!r}")
    if isinstance(spec, LossSpec) and not callable(spec.needs):
        if isinstance(spec.needs, str) or not isinstance(spec.needs, Collection):
            raise PluginError(f"{spec.name}: needs must be a set of words, got {spec.needs!r}")
        for need in spec.needs:
            if need not in NEEDS:
                raise PluginError(f"{spec.name}: unknown need {need!r}{nearest(need, NEEDS)}")


def _check_reference(spec: Spec, field: str) -> None:
    value = getattr(spec, field)
    if isinstance(value, str) and not _REFERENCE.match(value):
        raise PluginError(f"{spec.name}: {field} must be 'package.module:Name', got {value!r}")
    if not isinstance(value, str) and not callable(value):
        raise PluginError(f"{spec.name}: {field} is neither a dotted string nor a callable, but {value!r}")


def _check_backend(spec: BackendSpec) -> None:
    for field in ("components", "encoders", "conditioning"):
        _check_names(spec.name, field, getattr(spec, field))
    if not isinstance(spec.reaches, Mapping):
        raise PluginError(f"{spec.name}: reaches must be a mapping of needs to components, got {spec.reaches!r}")
    for need, value in spec.reaches.items():
        _check_names(spec.name, f"reaches[{need!r}]", value)
    if spec.layout is not None:
        _check_layout(spec.name, spec.layout)


def _check_names(name: str, field: str, value: Any) -> None:
    if not isinstance(value, tuple | list) or not all(isinstance(one, str) for one in value):
        raise PluginError(f"{name}: {field} must be a tuple of names, got {value!r}")


def _check_layout(name: str, layout: Any) -> None:
    if not isinstance(layout, FileLayout):
        raise PluginError(f"{name}: layout must be a FileLayout, got {layout!r}")
    _check_names(name, "layout.ldm_names", layout.ldm_names)
    for field, texts in (("prefixes", layout.prefixes), ("metadata", layout.metadata)):
        if not isinstance(texts, Mapping) or not all(isinstance(text, str) for pair in texts.items() for text in pair):
            raise PluginError(f"{name}: layout.{field} must be a mapping of text to text, got {texts!r}")


def one_line(error: BaseException) -> str:
    try:
        text = " ".join(str(error).split())
    except Exception:  # an error that cannot say what it is
        text = ""
    return text if isinstance(error, PluginError) else f"{type(error).__name__}: {text}".rstrip(": ")
