"""Examining a saver."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora_forge.contracts import LayerKey, LoraWeights, SaveRequest, TargetLayer
from lora_forge.errors import LoraFileError, LoraForgeError
from lora_forge.files.lora_file import open_lora
from lora_forge.files.names import own_names
from lora_forge.files.read import read_lora
from lora_forge.plugins import attribute_named
from lora_forge.records import SaverSpec
from lora_forge.testing.compare import listed, not_finite, relative, same_bits, shape_of
from lora_forge.testing.examination import Book, Broken, in_words
from lora_forge.testing.stage import ALPHA, ONE_ENCODER, RANK, TINY, backend_of, personal_bank, some_layers, tiny_layers

# Files in half precision are welcome: bfloat16 keeps three digits of A and of B, and so two of ΔW.
TOLERANCE = 1e-2
_METADATA = {f"note_{number}": f"words {number}" for number in range(8)} | {"lora_forge": '{"format": 1}'}
_STRANGE = "a „strange“ 🦉 prompt / with: everything?"


def examine_saver(book: Book, spec: SaverSpec, options: Any, make: Callable[[], Callable[..., Any]]) -> None:
    """See `lora_forge.testing.RULES`."""
    with tempfile.TemporaryDirectory(prefix="lora-forge-") as folder:
        exam = _Exam(spec, make, Path(folder))
        request = exam.request("plain", _weights(some_layers()))
        with book.rule("one_file", vital=True):
            exam.save(request)
        with book.rule("immutable", vital=True):
            exam.check_immutable()
        with book.rule("reader", vital=True):
            exam.read(request)
        with book.rule("gives_back", vital=True):
            for given in exam.requests():
                exam.save(given)
                exam.check_gives_back(given)
            exam.check_other_family()
        with book.rule("reproducible"):
            exam.check_reproducible(request)
        with book.rule("names"):
            exam.check_names()


class _Exam:
    def __init__(self, spec: SaverSpec, make: Callable[[], Callable[..., Any]], folder: Path) -> None:
        self.spec, self.make, self.folder = spec, make, folder

    def request(
        self, where: str, weights: LoraWeights, prompt: str = "a steampunk owl", model: str = TINY
    ) -> SaveRequest:
        """To be written into a folder of its own."""
        path, backend = self.folder / where / f"lora{self.spec.suffix}", backend_of(model)
        return SaveRequest(path, weights, RANK, ALPHA, backend.name, prompt, dict(_METADATA), backend.layout)

    def requests(self) -> list[SaveRequest]:
        """Several components; some layers of zeros among them; a single layer; layers of one component."""
        layers = some_layers()
        several, zeros = _weights(layers), _weights(layers)
        for sizes in zeros.values():
            for pair in list(sizes.values())[::2]:
                pair["lora_B"].zero_()
        one = [layer for layer in tiny_layers() if layer.component != "unet"][:1]
        own = [layer for layer in layers if layer.component == layers[-1].component]
        named = {"several": several, "zeros": zeros, "one-layer": _weights(one), "one-component": _weights(own)}
        return [self.request(where, weights) for where, weights in named.items()]

    def save(self, request: SaveRequest) -> None:
        """Have it written as a run does: to a file, or folder, that exists already and is empty."""
        request.path.parent.mkdir(parents=True, exist_ok=True)
        if self.spec.folder:
            shutil.rmtree(request.path, ignore_errors=True)
            request.path.mkdir()
        else:
            request.path.touch()
        beside = {path.name for path in request.path.parent.iterdir()}
        self.make()(request)
        kind = "folder" if self.spec.folder else "file"
        if not (request.path.is_dir() if self.spec.folder else request.path.is_file()):
            raise Broken(
                f"the {kind} it was given, request.path, is gone after it; write {request.path.name} and leave it"
            )
        others = sorted({path.name for path in request.path.parent.iterdir()} - beside)
        wrote = f"it wrote {listed(others)} beside it: " if others else ""
        if not any(_content(request.path).values()):
            raise Broken(
                f"it wrote nothing to the {kind} it was given; {wrote}write to request.path as it is, no suffix"
            )
        if others:
            raise Broken(f"{wrote}a run keeps one {kind}, request.path, and leaves the others lying about")

    def check_immutable(self) -> None:
        weights = _weights(some_layers())
        request = self.request("immutable", weights)
        names = {component: list(layers) for component, layers in weights.items()}
        before = _weights(some_layers())
        self.save(request)
        changed = [] if dict(request.metadata) == _METADATA else ["metadata"]
        if {component: list(layers) for component, layers in weights.items()} != names:
            changed.append("weights' layers")
        else:
            changed += [
                f"{name} of {component}.{layer}"
                for component, layers in before.items()
                for layer, pair in layers.items()
                for name, tensor in pair.items()
                if name not in weights[component][layer] or not same_bits(tensor, weights[component][layer][name])
            ]
        if changed:
            raise Broken(
                f"it changes the request's {listed(changed)}; the run's result holds the same ones: work on copies"
            )

    def read(self, request: SaveRequest) -> dict[LayerKey, torch.Tensor]:
        """ΔW of each layer as the file gives it back, float64."""
        if self.spec.reader is None:
            return self._read_as_own(request)
        try:
            read = attribute_named(self.spec.reader)(request.path)
        except (Exception, SystemExit) as error:
            raise Broken(f"its reader cannot read what the saver wrote: {in_words(error)}") from error
        return _flat(read)

    def _read_as_own(self, request: SaveRequest) -> dict[LayerKey, torch.Tensor]:
        try:
            model = next(one for one in (TINY, ONE_ENCODER) if backend_of(one).name == request.family)
            weights = read_lora(request.path, tiny_layers(model), layout=request.layout, rank=RANK, alpha=ALPHA)
            _check_names(request)
        except LoraFileError as error:
            raise Broken(
                f"it names no reader, and lora-forge's own cannot read the file of a {request.family!r} LoRA "
                f"({error}); name one, SaverSpec(reader=…): a callable, or 'package.module:name', that takes the path "
                "and gives ΔW of each layer, {component: {layer: (out, in)}}; or write the names that request.layout "
                "and lora_forge.files.names give"
            ) from error
        return _deltas(weights)

    def check_gives_back(self, request: SaveRequest) -> None:
        expected, found = _deltas(request.weights), self.read(request)
        for key, delta in expected.items():
            where = f"{'.'.join(key)} ({request.path.parent.name})"
            if key not in found:
                if bool(delta.any()):
                    raise Broken(f"the file has no {where}; write every layer of request.weights")
                continue
            if found[key].shape != delta.shape:
                raise Broken(
                    f"ΔW of {where} comes back in {shape_of(found[key])}, not (out, in) = {tuple(delta.shape)}"
                )
            if (error := relative(delta, found[key])) > TOLERANCE or not_finite(found[key]):
                sizes = float(found[key].norm()), float(delta.norm())
                raise Broken(
                    f"ΔW of {where} comes back {error:.2g} of its size off: its norm is {sizes[0]:.5g}, saved was "
                    f"{sizes[1]:.5g} ({sizes[0] / sizes[1] if sizes[1] else float('inf'):.4g} times). ΔW is "
                    f"alpha / rank · B @ A, here {request.alpha:g} / {request.rank} · B @ A"
                )
        if extra := [".".join(key) for key, delta in found.items() if key not in expected and bool(delta.any())]:
            raise Broken(f"the file changes layers that are not in the request: {listed(extra)}")

    def check_other_family(self) -> None:
        """Another family's layers are given back as well, or refused in words: some formats are one family's."""
        request = self.request("one-encoder", _weights(some_layers(ONE_ENCODER)), model=ONE_ENCODER)
        try:
            self.save(request)
        except LoraForgeError:
            return
        self.check_gives_back(request)

    def check_reproducible(self, request: SaveRequest) -> None:
        for where in ("again", "elsewhere/deeper", "third"):
            again = replace(request, path=self.folder / where / f"other{self.spec.suffix}")
            self.save(again)
            if _content(again.path) != _content(request.path):
                raise Broken(
                    "the same request written to another path gives other bytes; leave out dates, paths and whatever "
                    "has no order (safetensors' own metadata: lora_forge.files.canonical.write_safetensors sorts it)"
                )

    def check_names(self) -> None:
        request = self.request("", _weights(some_layers()), prompt=_STRANGE)
        request = replace(request, path=self.folder / "ein Käse, two words" / f"eine Eule 🦉{self.spec.suffix}")
        try:
            self.save(request)
        except (Exception, SystemExit) as error:
            what = str(error) if isinstance(error, Broken) else f"it raised {in_words(error)}"
            raise Broken(f"with the prompt {_STRANGE!r} and the path {request.path.name!r}, {what}") from error
        self.check_gives_back(request)


def _content(path: Path) -> dict[str, bytes]:
    """A file's bytes, or those of every file in a folder."""
    if not path.is_dir():
        return {"": path.read_bytes()}
    return {one.relative_to(path).as_posix(): one.read_bytes() for one in path.rglob("*") if one.is_file()}


def _check_names(request: SaveRequest) -> None:
    """lora-forge reads other spellings than it writes; the family's own readers may not. Raises LoraFileError."""
    keys = [(component, layer) for component, layers in request.weights.items() for layer in layers]
    known = own_names(keys, request.layout)
    lora = open_lora(request.path)
    if lora.format == "peft":  # layers are called as the library installed calls them
        return
    for layer in lora.layers:
        if layer.name not in known and (layer.component, layer.layer) in keys:
            raise LoraFileError(f"{layer.name!r} is no name that such a LoRA's readers know")


def _weights(layers: Sequence[TargetLayer]) -> LoraWeights:
    return personal_bank(layers, [0]).weights(0)


def _deltas(weights: LoraWeights) -> dict[LayerKey, torch.Tensor]:
    return {
        (component, layer): ALPHA / RANK * (pair["lora_B"].double() @ pair["lora_A"].double())
        for component, layers in weights.items()
        for layer, pair in layers.items()
    }


def _flat(read: Any) -> dict[LayerKey, torch.Tensor]:
    """What a reader gave, checked to be `{component: {layer: ΔW}}`."""
    if not isinstance(read, Mapping) or not all(isinstance(layers, Mapping) for layers in read.values()):
        raise Broken(f"its reader gives a {type(read).__name__} that is not {{component: {{layer: ΔW}}}}")
    flat = {(component, layer): delta for component, layers in read.items() for layer, delta in layers.items()}
    for key, delta in flat.items():
        try:
            flat[key] = torch.as_tensor(delta).detach().cpu().double()
        except Exception as error:
            raise Broken(f"its reader gives {type(delta).__name__} for {key}, not ΔW as numbers") from error
    return flat
