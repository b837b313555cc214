"""The built-ins are written with what anybody's plugin may import, and with nothing else."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lora_forge

PACKAGE = Path(lora_forge.__file__).parent
PUBLIC = {
    "lora_forge",
    "lora_forge.records",
    "lora_forge.hookspecs",
    "lora_forge.contracts",
    "lora_forge.errors",
    "lora_forge.bank",
    "lora_forge.batch",
    "lora_forge.frozen",
    "lora_forge.prompts",
    "lora_forge.schedules",
    "lora_forge.seeds",
    "lora_forge.files",
    "lora_forge.clip_unet",
}
OWN = ("lora_forge.files.", "lora_forge.clip_unet.", "lora_forge.builtin")


def imported(source: str, package: str) -> Iterator[str]:
    """The dotted names that a module of `package` imports, anywhere in it; a name from a package is `package.name`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (above, node.module) if part)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def forbidden(source: str, package: str = "lora_forge.builtin") -> list[str]:
    """The modules of this project that a module imports and a third party may not."""
    return [
        name
        for name in imported(source, package)
        if name.split(".")[0] == "lora_forge" and is_module(name) and name not in PUBLIC and not name.startswith(OWN)
    ]


MODULES = sorted((PACKAGE / "builtin").rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_built_in_imports_only_what_a_third_party_may(path: Path) -> None:
    package = ".".join(path.parent.relative_to(PACKAGE.parent).parts)
    assert forbidden(path.read_text(encoding="utf-8"), package) == []


@pytest.mark.parametrize("path", sorted((PACKAGE / "clip_unet").glob("*.py")), ids=lambda path: path.name)
def test_what_plugins_may_import_for_their_backends_knows_no_built_in(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert forbidden(source, "lora_forge.clip_unet") == []
    assert not [name for name in imported(source, "lora_forge.clip_unet") if name.startswith("lora_forge.builtin")]


@pytest.mark.parametrize(("family", "other"), [("sd15", "sdxl"), ("sdxl", "sd15")])
def test_no_family_imports_another(family: str, other: str) -> None:
    package = f"lora_forge.builtin.{family}"
    for path in (PACKAGE / "builtin" / family).glob("*.py"):
        names = imported(path.read_text(encoding="utf-8"), package)
        assert not [name for name in names if name.startswith(f"lora_forge.builtin.{other}")], path.name


def test_there_are_built_ins_for_the_test_above_to_look_at() -> None:
    assert {"losses.py", "backends.py", "sdxl/backend.py", "sd15/backend.py"} <= {
        path.relative_to(PACKAGE / "builtin").as_posix() for path in MODULES
    }


def test_every_public_module_is_there() -> None:
    assert all(is_module(name) for name in PUBLIC)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import lora_forge.runner", ["lora_forge.runner"]),
        ("from lora_forge import plugins", ["lora_forge.plugins"]),
        ("from lora_forge.config.run import RunConfig", ["lora_forge.config.run"]),
        ("def f():\n    from ..plan import Plan", ["lora_forge.plan"]),
        ("from .. import options", ["lora_forge.options"]),
        ("from lora_forge import LossSpec, hookimpl, records", []),
        ("from lora_forge.files.names import universal_name", []),
        ("from .sdxl import tiny", []),
        ("import torch, lora_forge.batch", []),
    ],
)
def test_a_forbidden_import_would_be_found_wherever_it_is(source: str, found: list[str]) -> None:
    assert forbidden(source) == found
