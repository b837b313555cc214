"""What is written appears whole or not at all: made beside its place, under another name, and moved there at once."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_forge.errors import OutputError, UsageError

# What a folder holds that may be replaced: an adapter of PEFT's for each component, and nothing beside them.
_ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "README.md"}


def check_output(path: Path, *, overwrite: bool, folder: bool = False) -> None:
    """Check that a file (or a folder of adapters) can be written at `path`, without leaving one. Raises OutputError."""
    shown = f"output {str(path)!r}"
    if "\0" in str(path):
        raise OutputError(f"{shown} is no path")
    if os.path.isdir(path) and not folder:
        raise OutputError(f"{shown} is a directory")
    if os.path.exists(path) and not overwrite:
        raise OutputError(f"{shown} exists; --overwrite replaces it")
    if os.path.exists(path) and not folder and not os.path.isfile(path):
        raise OutputError(f"{shown} is not a regular file")
    if os.path.exists(path) and folder and not _holds_adapters_alone(path):
        raise OutputError(f"{shown} is not a folder that holds adapters alone, and is not replaced")
    ancestor = next(parent for parent in path.absolute().parents if os.path.exists(parent))
    if not ancestor.is_dir():
        raise OutputError(f"{shown}: {str(ancestor)!r} is not a directory")
    try:
        with suppress(FileNotFoundError):
            os.stat(path)  # raises where a name is too long
        with tempfile.NamedTemporaryFile(dir=ancestor, prefix=".lora-forge-"):
            pass
    except OSError as error:
        raise OutputError(f"{shown} cannot be written: {error.strerror}") from error


def check_apart(inputs: Iterable[Path], output: Path) -> None:
    """Check that what is written replaces nothing that is read. Raises OutputError."""
    written = _resolved(output)
    for path in inputs:
        read = _resolved(path)
        if read == written or read in written.parents or written in read.parents:
            raise OutputError(f"output {str(output)!r} is, or is within, or holds the input {str(path)!r}")


@contextmanager
def appearing(path: Path, *, overwrite: bool, folder: bool = False) -> Iterator[Path]:
    """Where to write instead of `path`: an empty file, or folder, that is moved there if all goes well.

    It gets the usual permissions. Raises OutputError when the disk refuses, or `path` has come to be meanwhile.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path, folder=folder)
        yield temporary
        check_output(path, overwrite=overwrite, folder=folder)
        mask = _umask()
        if folder:
            temporary.chmod(0o777 & ~mask)
            _move_folder(temporary, path)
        else:
            temporary.chmod(0o666 & ~mask)
            os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise OutputError(f"output {str(path)!r} cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None and folder:
            shutil.rmtree(temporary, ignore_errors=True)
        elif temporary is not None:
            temporary.unlink(missing_ok=True)


def _temporary(path: Path, *, folder: bool) -> Path:
    prefix = f".{path.stem[:40]}-"
    if folder:
        return Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix))
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=path.suffix)
    os.close(handle)
    return Path(name)


def _move_folder(new: Path, path: Path) -> None:
    """A folder with something in it cannot be replaced in one step: the old one steps aside first."""
    if not path.exists():
        new.rename(path)
        return
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.stem[:40]}-"))
    try:
        path.rename(aside / "old")
        new.rename(path)
    except BaseException:
        if (aside / "old").exists() and not path.exists():
            (aside / "old").rename(path)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _holds_adapters_alone(path: Path) -> bool:
    try:
        return all({entry.name for entry in inner.iterdir()} <= _ADAPTER for inner in path.iterdir())
    except OSError:  # a file among them, or what may not be looked into
        return False


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"{str(path)!r} is no path: {error}") from error
