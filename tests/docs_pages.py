"""The fenced blocks of README.md and docs/, and how each kind of them is executed.

What needs the Hub, a GPU or a fresh machine is replaced by what runs here, in `Reader.command` and, for the
Hub id and the device in Python blocks, in `Reader._python`; nothing else is replaced.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parent.parent
PAGES = (CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md")))
EXECUTED = ("bash", "python", "toml", "json")
SHOWN_ONLY = ("text", "mermaid")
# Each command line of a fresh machine ends in what is executed here, in the environment there is.
SETUP = re.compile(r"python3 -m venv \.venv && \.venv/bin/pip install -q -c constraints\.txt (\.|-e \"\.\[dev\]\") && ")
ACCEPTANCE = "python benchmarks/accept_sdxl.py"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
ON_A_GPU = re.compile(r'dtype=torch\.float16\s*\)\.to\("cuda"\)')

_FENCE = re.compile(r"^```(\S*)[ ]?([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE_NAME = re.compile(r"# ([\w-]+\.(?:py|toml))$")


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
        return first.group(1) if first else self.info or None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield Block(page, line, match.group(1), match.group(2), match.group(3))


def commands(block: Block) -> list[str]:
    return [line.strip() for line in block.text.replace("\\\n", " ").splitlines() if line.strip()]


class Reader:
    """Does what a page says, block by block, in the current folder."""

    def __init__(self, tiny_folder: Path, full_size_folder: Path) -> None:
        self._tiny, self._full_size = tiny_folder, full_size_folder
        self._names: dict[str, Any] = {"__name__": "page"}

    def do(self, block: Block) -> None:
        actions: dict[str, Callable[[Block], None]] = {
            "bash": self._bash,
            "python": self._python,
            "toml": self._toml,
            "json": self._json,
        }
        if block.language in actions:
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
        program, *arguments = shlex.split(line)
        if line == ACCEPTANCE:
            self._accept(["--model", "tiny_sdxl", "--device", "cpu", "--iterations", "2", "--steps", "2"])
        elif program != "lora-forge":
            raise AssertionError(f"no test knows how to run {line!r}")
        elif "sdxl_base" in arguments:
            self._forge([*arguments, "--dry-run", "--base-model", str(self._full_size)])
            self._forge(["tiny_sdxl" if word == "sdxl_base" else word for word in arguments])
        else:
            self._forge(arguments)

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
        text = ON_A_GPU.sub("dtype=torch.float32)", block.text.replace(SDXL, str(self._tiny)))
        code = compile(text, str(block), "exec")
        if block.file_name:
            Path(block.file_name).write_text(block.text, encoding="utf-8")
        else:
            exec(code, self._names)

    def _toml(self, block: Block) -> None:
        data = tomllib.loads(block.text)
        if "project" in data:  # a part of a plugin's pyproject.toml
            from lora_forge.plugins import ENTRY_POINT_GROUP

            assert list(data["project"]["entry-points"]) == [ENTRY_POINT_GROUP]
            return
        name = block.file_name or "run.toml"
        Path(name).write_text(block.text, encoding="utf-8")
        self._forge(["run", "--config", name, "--dry-run"])

    def _json(self, block: Block) -> None:
        from lora_forge.config.model import parse_model_config

        parse_model_config(json.loads(block.text), name="example", source=str(block))
        if block.file_name:
            Path(block.file_name).write_text(block.text, encoding="utf-8")


def make_full_size_folder(folder: Path) -> Path:
    """SDXL base 1.0's real configs with weight files that hold next to nothing: enough for a dry run."""
    import torch
    from safetensors.torch import save_file

    from lora_forge.builtin.sdxl.sources import CONFIGS

    shutil.copytree(CONFIGS, folder)
    for encoder in ("text_encoder", "text_encoder_2"):
        save_file(
            {"text_model.embeddings.token_embedding.weight": torch.zeros(1)}, folder / encoder / "model.safetensors"
        )
    return folder
