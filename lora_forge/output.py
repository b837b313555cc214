"""What is written appears whole or not at all: made beside its place, under another name, and moved there at once.

What goes to a URL is made in a temporary folder and uploaded when it is whole.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.request import url2pathname

from lora_forge.errors import OutputError, UsageError
from lora_forge.files.adapter_config import CONFIG, WEIGHTS, is_own
from lora_forge.files.header import url_of

if TYPE_CHECKING:
    from upath import UPath

Place: TypeAlias = "Path | UPath"  # on this machine, or at a URL
_URL = re.compile(r"(?:[a-z][a-z0-9_+.-]*::)*([a-z][a-z0-9_+.-]+)://", re.IGNORECASE)

# What a folder holds that may be replaced: an adapter of PEFT's for each component, and nothing beside them.
_ADAPTER = {CONFIG, WEIGHTS, "README.md"}


def place_of(text: str) -> Place:
    """A path, or a URL of any kind that fsspec knows. Raises OutputError for one that it does not."""
    url = _URL.match(text)
    if not url:
        return Path(text)
    if url.group(0).lower() == "file://":
        return _path_of(text)
    try:
        from upath import UPath

        place = UPath(text)
        assert place.fs is not None  # imports what the protocol needs
        return place
    except ImportError as error:
        raise OutputError(f"output {text!r} needs a package that is not installed here: {error}") from error
    except Exception as error:  # of whatever package serves the protocol
        raise OutputError(f"output {text!r} cannot be written: {_reason(error)}") from error


def _path_of(url: str) -> Path:
    """The path of a `file://` URL."""
    host, slash, path = url[len("file://") :].partition("/")
    if host not in ("", "localhost") or not slash:
        raise OutputError(f"output {url!r} names a host; a file of this machine is file:///…, or just its path")
    return Path(url2pathname(f"/{path}"))


def check_output(path: Place, *, overwrite: bool, folder: bool = False) -> None:
    """Check that a file (or a folder of adapters) can be written at `path`, without leaving one. Raises OutputError.

    Of a URL, only whether something is there already.
    """
    shown = f"output {str(path)!r}"
    if not isinstance(path, Path):
        _check_url(path, overwrite=overwrite, folder=folder)
        return
    if "\0" in str(path) or not path.name:
        raise OutputError(f"{shown} is no path of a file")
    if url := url_of(path):
        raise OutputError(f"output {url!r} is a URL; a path is needed here")
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


def _check_url(place: UPath, *, overwrite: bool, folder: bool) -> bool:
    """Whether something is there that may be replaced, in one look. Raises OutputError."""
    shown = f"output {str(place)!r}"
    try:
        is_folder = place.fs.info(place.path)["type"] == "directory"
    except FileNotFoundError:
        return False
    except Exception as error:  # of whatever package serves the protocol
        raise OutputError(f"{shown} cannot be looked up: {_reason(error)}") from error
    if is_folder and not folder:
        raise OutputError(f"{shown} is a directory")
    if not overwrite:
        raise OutputError(f"{shown} exists; --overwrite replaces it")
    if folder:
        raise OutputError(f"{shown} exists, and a folder at a URL is not replaced; give another name")
    return True


@contextmanager
def appearing(path: Place, *, overwrite: bool, folder: bool = False) -> Iterator[Path]:
    """Where to write instead of `path`: an empty file, or folder, that is moved there, or uploaded, if all goes well.

    It gets the usual permissions. Raises OutputError when the disk refuses, or `path` has come to be meanwhile.
    """
    if not isinstance(path, Path):
        with _uploading(path, overwrite=overwrite, folder=folder) as made:
            yield made
        return
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


@contextmanager
def _uploading(place: UPath, *, overwrite: bool, folder: bool) -> Iterator[Path]:
    try:
        with tempfile.TemporaryDirectory(prefix="lora-forge-") as above:
            made = Path(above) / f"made{place.suffix}"
            made.mkdir() if folder else made.touch()
            yield made
            there = _check_url(place, overwrite=overwrite, folder=folder)
            _upload(made, place, new=not there)
    except OSError as error:
        raise OutputError(f"output {str(place)!r} cannot be written: {error.strerror or error}") from error


def _upload(made: Path, place: UPath, *, new: bool) -> None:
    """Put a file, or all files of a folder, where they belong, or none of what was not there before."""
    files = [made] if made.is_file() else sorted(one for one in made.rglob("*") if one.is_file())
    targets = [f"{place.path}/{one.relative_to(made).as_posix()}" if one != made else place.path for one in files]
    try:
        place.fs.put([str(one) for one in files], targets)  # by lists, since names alone may hold a * or [
    except Exception as error:  # of whatever package serves the protocol
        if new:
            with suppress(Exception):
                place.fs.rm(place.path, recursive=True)
        raise OutputError(f"output {str(place)!r} cannot be written: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


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
    """Whether a folder holds an adapter of ours for each component, and nothing else: other people's are theirs."""
    try:
        inner = {one: {entry.name for entry in one.iterdir()} for one in path.iterdir()}
    except OSError:  # a file among them, or what may not be looked into
        return False
    return all(names <= _ADAPTER and is_own(one / CONFIG) for one, names in inner.items())


def _umask() -> int:
    with suppress(OSError, ValueError, IndexError):  # where it can be read, no other thread sees it changed
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.split("Umask:")[1].split()[0], 8)
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"{str(path)!r} is no path: {error}") from error


def json_line(value: Mapping[str, Any]) -> str:
    """An object as JSON in one line; numbers that are not finite, for which JSON has no word, become null."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
