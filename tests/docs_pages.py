"""The fenced blocks of README.md and docs/, and how each kind of them is executed.

What needs the Hub, a GPU or a fresh machine is replaced by what runs here, in `Reader.command` and, for
Hub ids and the device in Python blocks, in `Reader._python`; nothing else is replaced. Pages that install with pip or
run pytest are also followed to the letter, in an environment of their own: tests/docs_shell.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_forge.builtin.sd15.family import SD15
from lora_forge.builtin.sdxl.family import SDXL
from lora_forge.clip_unet.tiny import tiny_folder
from lora_forge.config.model import read_model_config

CHECKOUT = Path(__file__).parent.parent
DOCS = CHECKOUT / "docs"
PAGES = (CHECKOUT / "README.md", *sorted(DOCS.rglob("*.md")))
PLUGIN_PAGES = tuple(sorted((CHECKOUT / "plugins").rglob("README.md")))
EXECUTED = ("bash", "python", "toml", "json")
SHOWN_ONLY = ("text",)
# Each command line of a fresh machine ends in what is executed here, in the environment there is.
SETUP = re.compile(r"python3 -m venv \.venv && \.venv/bin/pip install -q -c constraints\.txt (\.|-e \"\.\[dev\]\") && ")
ACCEPTANCE = "python benchmarks/accept_sdxl.py"
# The model configs of real models, each with its family; its tiny model stands for it here.
FAMILIES = {"sdxl_base": SDXL, "sd15": SD15}
ON_A_GPU = re.compile(r'dtype=torch\.float16\s*\)\.to\("cuda"\)')

_FENCE = re.compile(r"^```(\S*)[ ]?([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE_NAME = re.compile(r"# ([\w-]+\.(?:py|toml))$")
_TITLE = re.compile(r'title="([\w./-]+)"$')
_ASSIGNMENT = re.compile(r"[A-Z_]+=")


@dataclass(frozen=True)
class Block:
    """One fenced block: where it is, its language, the rest of its info string, and its text."""

    page: Path
    line: int
    language: str
    info: str
    text: str

    @property
    def file_name(self) -> str | None:
        """The file the block is the content of, if its first line or its info string names one."""
        first = _FILE_NAME.match(self.text.partition("\n")[0])
        return first.group(1) if first else self.title or self.info or None

    @property
    def title(self) -> str | None:
        """The path within a package that the block is shown under, where it is."""
        title = _TITLE.match(self.info)
        return title.group(1) if title else None

    @property
    def sets_up(self) -> bool:
        """Whether it makes the reader's environment and installs lora-forge in it; here that is done already."""
        return self.language == "bash" and self.text.startswith("python3 -m venv .venv\n")

    @property
    def of_the_project(self) -> bool:
        """Whether it shows a file of lora-forge itself, or a part of one; tests/test_docs_site.py holds it to that."""
        return bool(self.title and self.title.startswith("lora_forge/"))

    def write(self) -> None:
        """Write the file it is the content of, in the current folder."""
        assert self.file_name
        path = Path(self.file_name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.text, encoding="utf-8")

    def __str__(self) -> str:
        return f"{self.page.relative_to(CHECKOUT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield Block(page, line, match.group(1), match.group(2), match.group(3))


def commands(block: Block) -> list[str]:
    return [line.strip() for line in block.text.replace("\\\n", " ").splitlines() if line.strip()]


class Reader:
    """Does what a page says, block by block, in the current folder."""

    def __init__(self, full_size_folders: dict[str, Path]) -> None:
        """full_size_folders: of each model config in `FAMILIES`, what `make_full_size_folders` made."""
        self._full_size = full_size_folders
        self._names: dict[str, Any] = {"__name__": "page"}

    def do(self, block: Block) -> None:
        if block.sets_up:
            return
        actions: dict[str, Callable[[Block], None]] = {
            "bash": self._bash,
            "python": self._python,
            "toml": self._toml,
            "json": self._json,
        }
        if block.language in SHOWN_ONLY and block.title:
            block.write()
        elif block.language in actions:
            actions[block.language](block)

    def _bash(self, block: Block) -> None:
        for line in commands(block):
            self.command(line)

    def command(self, line: str) -> None:
        """Run one command line, or what stands for it here."""
        setup = SETUP.match(line)
        if setup:  # tests/test_docs.py runs the set-up itself in a test marked slow
            line = line[setup.end() :].removeprefix(".venv/bin/")
        if line == "pytest -n 2":  # this is it
            return
        words = shlex.split(line)
        if words[0] == "export":  # for the rest of the page; the folder that Python is to look in is this one
            assert words[1:] == ["PYTHONPATH=."], line
            sys.path.insert(0, str(Path.cwd()))
            return
        if _ASSIGNMENT.match(words[0]):
            self._with(words[0], shlex.join(words[1:]))
            return
        program, *arguments = words
        if program == "cd":
            os.chdir(arguments[0])
        elif program == "pip":
            self._pip(arguments)
        elif program == "pytest":  # run by tests/test_docs.py to the letter, in tests marked slow
            assert all(Path(one).exists() for one in arguments if not one.startswith("-")), line
        elif line == ACCEPTANCE:
            self._accept(["--model", "tiny_sdxl", "--device", "cpu", "--iterations", "2", "--steps", "2"])
        elif program != "lora-forge":
            raise AssertionError(f"no test knows how to run {line!r}")
        elif arguments[0] == "run" and (real := FAMILIES.keys() & set(arguments)):
            (model,) = real
            self._forge([*arguments, "--dry-run", "--base-model", str(self._full_size[model])])
            self._forge([FAMILIES[model].tiny.name if word == model else word for word in arguments])
        else:
            self._forge(arguments)

    def _with(self, assignment: str, line: str) -> None:
        name, _, value = assignment.partition("=")
        before = os.environ.get(name)
        os.environ[name] = value
        try:
            self.command(line)
        finally:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before

    def _pip(self, arguments: list[str]) -> None:
        """Instead of installing the package in the current folder, have it found there."""
        if arguments[0] == "wheel":
            return
        project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
        info = Path(f"{project['name'].replace('-', '_')}-{project['version']}.dist-info")
        if info.exists():
            return
        info.mkdir()
        about = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        (info / "METADATA").write_text(about, encoding="utf-8")
        points = "".join(f"{key} = {value}\n" for key, value in project["entry-points"]["lora_forge"].items())
        (info / "entry_points.txt").write_text(f"[lora_forge]\n{points}", encoding="utf-8")
        sys.path.insert(0, str(Path.cwd()))
        importlib.invalidate_caches()

    def _forge(self, arguments: list[str]) -> None:
        from lora_forge.cli.main import main

        assert main(arguments) == 0, arguments

    def _accept(self, arguments: list[str]) -> None:
        spec = importlib.util.spec_from_file_location("accept_sdxl", CHECKOUT / "benchmarks" / "accept_sdxl.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert module.main(arguments) == 0

    def _python(self, block: Block) -> None:
        text = ON_A_GPU.sub("dtype=torch.float32)", block.text)
        for model, family in FAMILIES.items():
            text = text.replace(str(read_model_config(model).base_model), str(tiny_folder(family)))
        code = compile(text, str(block), "exec")
        if block.of_the_project:
            return
        if block.file_name:
            block.write()
        else:
            exec(code, self._names)

    def _toml(self, block: Block) -> None:
        data = tomllib.loads(block.text)
        if "project" in data:  # a plugin's pyproject.toml, or a part of it
            from lora_forge.plugins import ENTRY_POINT_GROUP

            assert list(data["project"]["entry-points"]) == [ENTRY_POINT_GROUP]
            if block.title:
                block.write()
            return
        name = block.file_name or "run.toml"
        Path(name).write_text(block.text, encoding="utf-8")
        self._forge(["run", "--config", name, "--dry-run"])

    def _json(self, block: Block) -> None:
        from lora_forge.config.model import parse_model_config

        parse_model_config(json.loads(block.text), name="example", source=str(block))
        if block.file_name:
            block.write()


def make_full_size_folders(folder: Path) -> dict[str, Path]:
    """Of each real model its configs, with weight files that hold next to nothing: enough for a dry run."""
    import torch
    from safetensors.torch import save_file

    weights = {"text_model.embeddings.token_embedding.weight": torch.zeros(1)}
    for model, family in FAMILIES.items():
        shutil.copytree(family.configs, folder / model)
        for encoder in family.encoders:
            save_file(weights, folder / model / encoder / "model.safetensors")
    return {model: folder / model for model in FAMILIES}
