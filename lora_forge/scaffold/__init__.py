"""A complete package for a new plugin: what `lora-forge plugins new` writes.

The files' texts are in `templates/`: those of every package in `common`, and a folder for each kind.
"""

from __future__ import annotations

import importlib
import importlib.util
import keyword
import re
import string
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_forge.errors import OutputError, PluginError, UsageError
from lora_forge.hookspecs import EXTENSION_POINTS
from lora_forge.plugins import BUILTIN_MODULES

_TEMPLATES = Path(__file__).parent / "templates"
_NAME = re.compile(r"[a-z]([a-z0-9_-]*[a-z0-9])?\Z")
_LONGEST = 40  # so that generated lines stay within the length that formatters keep


@dataclass(frozen=True)
class _Kind:
    """What the templates of a kind leave open: its article, a summary, and what it depends on."""

    article: str
    summary: str
    dependencies: tuple[str, ...] = ("lora-forge",)


_KINDS = {
    "loss": _Kind("a", "moves a prompt towards another text"),
    "initializer": _Kind("an", "orthogonal rows in A, zeros in B"),
    "optimizer": _Kind("an", "gradient descent with momentum"),
    "saver": _Kind("a", "a numpy .npz file", ("lora-forge", "numpy")),
    "backend": _Kind("a", "one small text encoder and no denoiser"),
    "executor": _Kind("an", "several processes of this machine"),
}
KINDS: tuple[str, ...] = tuple(_KINDS)


class _Text(string.Template):
    """Placeholders are `§name`: code and workflows are full of dollars and braces."""

    delimiter = "§"


def check_name(name: str, kind: str) -> None:
    """Check that a package, a module and a plugin of this kind can be called `name`.

    Raises UsageError for a name that is none or is taken by a module, PluginError for a built-in's.
    """
    module = module_name(name)
    if not _NAME.match(name) or len(name) > _LONGEST:
        raise UsageError(
            f"{name!r} cannot name a plugin: lower-case letters, digits, '-' and '_', a letter first, "
            f"a letter or digit last, at most {_LONGEST}{_suggestion(name)}"
        )
    if keyword.iskeyword(module):
        raise UsageError(f"{name!r} cannot name a plugin: it is a word of the Python language")
    if module in _builtin_names(kind):
        raise PluginError(f"{name!r} is the name of a built-in {kind}, which would always be meant; choose another")
    if module == "tests" or _is_taken(module):
        raise UsageError(f"{name!r} cannot name a plugin: there is a Python module {module!r}; choose another")


def package_files(name: str, kind: str) -> dict[str, str]:
    """The text of every file of the package, by its path within it."""
    module, about = module_name(name), _KINDS[kind]
    values = {
        "name": name,
        "module": module,
        "kind": kind,
        "kind_title": f"{about.article} {kind}".capitalize(),
        "kind_title_lower": f"{about.article} {kind}",
        "summary": about.summary,
        "dependencies": ", ".join(f'"{dependency}"' for dependency in about.dependencies),
    }
    what, heading, use = _fill(f"{kind}/about.md", values).partition("## Use")
    values |= {"about": what.rstrip("\n"), "use": heading + use.rstrip("\n")}
    templates = {
        "README.md": "common/README.md",
        "LICENSE": "common/LICENSE",
        "pyproject.toml": "common/pyproject.toml",
        ".gitignore": "common/gitignore",
        ".github/workflows/test.yml": "common/workflow.yml",
        f"{module}/__init__.py": f"{kind}/hook.py",
        f"{module}/{kind}.py": f"{kind}/implementation.py",
        f"tests/test_{module}.py": f"{kind}/tests.py",
    }
    if kind == "backend":
        templates[f"model_config/{module}_config.json"] = "backend/model_config.json"
    return {path: _fill(template, values) for path, template in templates.items()}


def write_package(folder: Path, files: Mapping[str, str]) -> None:
    """Write the files into a new folder, all of them or none. Raises OutputError, also where one exists already."""
    try:
        if folder.exists() or folder.is_symlink():
            raise OutputError(f"{str(folder)!r} exists, and it is never overwritten; -o names another folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".lora-forge-") as temporary:
            made = Path(temporary) / "package"
            for name, text in files.items():
                path = made / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8", newline="\n")
            made.rename(folder)
    except (OSError, ValueError) as error:  # ValueError: a path that cannot be one
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"folder {str(folder)!r} cannot be written: {reason}") from error


def module_name(name: str) -> str:
    """What the module, and the plugin within lora-forge, are called."""
    return name.replace("-", "_")


def _fill(template: str, values: Mapping[str, str]) -> str:
    return _Text((_TEMPLATES / f"{template}.tmpl").read_text(encoding="utf-8")).substitute(values)


def _suggestion(name: str) -> str:
    close = re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-_0123456789")[:_LONGEST].rstrip("-_")
    return f"; {close!r} would do" if close else ""


def _builtin_names(kind: str) -> set[str]:
    hook = EXTENSION_POINTS[kind][0]
    modules = [importlib.import_module(f"lora_forge.builtin.{name}") for name in BUILTIN_MODULES]
    return {spec.name for module in modules if hasattr(module, hook) for spec in getattr(module, hook)()}


def _is_taken(module: str) -> bool:
    """Whether importing `module` would find something else, of Python or of what is installed here."""
    if module in sys.stdlib_module_names:
        return True
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None  # without: a mere folder of that name
