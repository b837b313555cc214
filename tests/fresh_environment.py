"""Virtual environments of a test's own, in which plugins are installed for real, by pip, from wheels.

The heavy libraries and lora-forge come from the environment the tests run in, through a `.pth` file, so
making one takes a moment and no download. What is installed in one is visible nowhere else.

    environment = FreshEnvironment.make(tmp_path / "environment")
    files = {"my_plugin.py": "..."}
    environment.install(wheel(tmp_path, "my-plugin", "1.0", files, {"plugin": "my_plugin"}))
    done = environment.run("plugins", "list")
"""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from warm import warm_python

CHECKOUT = Path(__file__).parent.parent
# What the surrounding shell may say that would reach into the environment.
_NOT_INHERITED = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LORA_FORGE_PLUGINS", "LORA_FORGE_TRACE"}


@dataclass(frozen=True)
class FreshEnvironment:
    """A virtual environment in `folder`, without pip, that sees the checkout and the libraries around it."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> FreshEnvironment:
        """Make one; about a tenth of a second. Nothing of lora-forge's own is installed in it."""
        venv.create(folder, with_pip=False, symlinks=os.name != "nt")
        environment = cls(folder)
        around = dict.fromkeys([str(CHECKOUT), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
        (environment.site / "surroundings.pth").write_text("".join(f"{path}\n" for path in around), encoding="utf-8")
        return environment

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    @property
    def site(self) -> Path:
        """Its own site-packages, where pip installs to."""
        scheme = "venv" if "venv" in sysconfig.get_scheme_names() else sysconfig.get_default_scheme()
        base = str(self.folder)
        return Path(sysconfig.get_path("purelib", scheme, {"base": base, "platbase": base}))

    def install(self, *wheels: Path) -> None:
        """Install wheels by pip, all in one call (a second or two), from nowhere but these files."""
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "--disable-pip-version-check", "--quiet"]
        command = [*pip, "install", "--no-index", "--no-deps", *map(str, wheels)]
        done = subprocess.run(command, capture_output=True, text=True, env=_environment({}), timeout=300)
        assert done.returncode == 0, done.stderr

    @property
    def warm(self) -> list[str]:
        """What starts its python in a moment: with the heavy libraries imported already (tests/warm.py)."""
        return warm_python(self.python, self.site)

    def run(
        self, *arguments: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None, warm: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """`lora-forge` with these arguments; `env` is added to the surrounding one."""
        return self.execute("-m", "lora_forge", *arguments, env=env, cwd=cwd, warm=warm)

    def execute(
        self, *arguments: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None, warm: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Its python with these arguments, in `cwd` (the environment's folder)."""
        command = [*(self.warm if warm else [str(self.python)]), *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=600, env=_environment(env or {}), cwd=cwd or self.folder
        )


def _environment(added: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in _NOT_INHERITED} | dict(added)


def wheel(
    folder: Path, name: str, version: str, files: Mapping[str, str], entry_points: Mapping[str, str] | None = None
) -> Path:
    """Write a pure-python wheel into `folder` and return its path; takes no build and no time.

    files: path in site-packages to text. entry_points: those of the group `lora_forge`, name to module.
    """
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    points = "".join(f"{key} = {value}\n" for key, value in (entry_points or {}).items())
    contents = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: lora-forge-tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[lora_forge]\n{points}" if points else "",
    }
    rows = [f"{path},{_digest(text)},{len(text.encode())}\n" for path, text in contents.items()]
    contents[f"{info}/RECORD"] = "".join(rows) + f"{info}/RECORD,,\n"
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in contents.items():
            archive.writestr(file, text)
    return path


def _digest(text: str) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
    return f"sha256={digest.decode().rstrip('=')}"
