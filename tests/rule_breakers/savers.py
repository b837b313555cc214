"""Savers that each break one rule."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_forge import SaverSpec
from lora_forge.builtin.backends import lora_forge_backends
from lora_forge.builtin.savers import diffusers, universal
from lora_forge.contracts import SaveRequest
from lora_forge.errors import LoraForgeError
from lora_forge.files.canonical import write_safetensors
from rule_breakers import Breaker

Deltas = dict[str, dict[str, torch.Tensor]]


def pickled(request: SaveRequest) -> None:
    """A format of its own that breaks no rule, with the reader below: ΔW itself."""
    scale = request.alpha / request.rank
    deltas = {
        component: {layer: scale * pair["lora_B"] @ pair["lora_A"] for layer, pair in layers.items()}
        for component, layers in request.weights.items()
    }
    buffer = io.BytesIO()
    torch.save(deltas, buffer)
    request.path.write_bytes(buffer.getvalue())


def unpickled(path: Path) -> Mapping[str, Mapping[str, torch.Tensor]]:
    deltas: Deltas = torch.load(path)
    return deltas


def nothing(request: SaveRequest) -> None:
    pass


def adds_a_suffix(request: SaveRequest) -> None:
    np.savez(f"{request.path}.npz", ranks=np.array(request.rank))


def writes_notes(request: SaveRequest) -> None:
    universal(request)
    request.path.with_suffix(".txt").write_text(request.prompt, encoding="utf-8")


def moves_it(request: SaveRequest) -> None:
    universal(request)
    request.path.rename(request.path.with_name("moved.bin"))


def scales_in_place(request: SaveRequest) -> None:
    diffusers(request)
    for layers in request.weights.values():
        for pair in layers.values():
            pair["lora_B"].mul_(request.alpha / request.rank)


def writes_into_metadata(request: SaveRequest) -> None:
    universal(request)
    request.metadata["format"] = "pt"  # type: ignore[index]


def drops_from_the_request(request: SaveRequest) -> None:
    universal(request)
    request.weights.pop("unet", None)


def no_safetensors(request: SaveRequest) -> None:
    pickled(request)


def own_names(request: SaveRequest) -> None:
    tensors = {
        f"{layer}.{name}": tensor
        for layers in request.weights.values()
        for layer, pair in layers.items()
        for name, tensor in pair.items()
    }
    write_safetensors(request.path, tensors, {})


def knows_sdxl_alone(request: SaveRequest) -> None:
    """SDXL's names of layers, whatever the family's own are."""
    sdxl = next(spec for spec in lora_forge_backends() if spec.name == "sdxl")
    universal(replace(request, layout=sdxl.layout))


def looks_up_sdxl(request: SaveRequest) -> None:
    title = {"sdxl": "Stable Diffusion XL"}[request.family]
    universal(replace(request, metadata={**request.metadata, "family": title}))


def refuses_others(request: SaveRequest) -> None:
    """A format of one family, which says so of any other: that breaks no rule."""
    if request.family != "sdxl":
        raise LoraForgeError(f"this format is SDXL's alone, it has no names for {request.family}")
    universal(request)


def cannot_read(path: Path) -> Deltas:
    raise OSError("not mine")


def reads_lists(path: Path) -> Any:
    return list(unpickled(path).items())


def forgets_alpha(request: SaveRequest) -> None:
    """Without alpha every reader takes alpha = rank."""
    diffusers(replace(request, alpha=float(request.rank)))


def forgets_a_layer(request: SaveRequest) -> None:
    weights = {component: dict(layers) for component, layers in request.weights.items()}
    last = list(weights)[-1]
    if len(weights) > 1:
        weights[last].popitem()
    diffusers(replace(request, weights=weights))


def changes_another_layer(request: SaveRequest) -> None:
    weights = {component: dict(layers) for component, layers in request.weights.items()}
    first = next(iter(weights.values()))
    first["invented"] = next(iter(first.values()))
    pickled(replace(request, weights=weights))


def transposed(path: Path) -> Deltas:
    return {c: {name: delta.T for name, delta in layers.items()} for c, layers in unpickled(path).items()}


def notes_its_path(request: SaveRequest) -> None:
    universal(replace(request, metadata={**request.metadata, "written_to": str(request.path)}))


_calls = itertools.count()


def counts(request: SaveRequest) -> None:
    universal(replace(request, metadata={**request.metadata, "count": str(next(_calls))}))


def ascii_only(request: SaveRequest) -> None:
    request.prompt.encode("ascii")
    universal(request)


def no_spaces(request: SaveRequest) -> None:
    target = Path(str(request.path).replace(" ", "_"))
    target.parent.mkdir(parents=True, exist_ok=True)
    universal(replace(request, path=target))


def raises(request: SaveRequest) -> None:
    raise ValueError("no disk")


def spec(factory: str | Callable[..., Any], **settings: Any) -> SaverSpec:
    return SaverSpec(name="breaker", summary="breaks a rule", factory=factory, **settings)


def breaker(what: str, factory: Callable[..., Any], rule: str, *words: str, **settings: Any) -> Breaker:
    return Breaker(what, spec(factory, **settings), rule, words)


def own(what: str, factory: Callable[..., Any], rule: str, *words: str, reader: Any = unpickled) -> Breaker:
    return breaker(what, factory, rule, *words, suffix=".pt", reader=reader)


BREAKERS = [
    breaker("writes nothing", nothing, "one_file", "wrote nothing", "request.path"),
    breaker("adds a suffix", adds_a_suffix, "one_file", "wrote nothing", "lora.safetensors.npz beside it", "no suffix"),
    breaker("writes a second file", writes_notes, "one_file", "lora.txt beside it", "one file"),
    breaker("moves the file away", moves_it, "one_file", "is gone", "lora.safetensors"),
    breaker("scales weights in place", scales_in_place, "immutable", "lora_B of text_encoder.", "work on copies"),
    breaker("writes into the metadata", writes_into_metadata, "immutable", "the request's metadata"),
    breaker("takes layers out of the request", drops_from_the_request, "immutable", "weights' layers"),
    breaker("names no reader for its own format", no_safetensors, "reader", "names no reader", "SaverSpec(reader=…)"),
    breaker("names layers its own way", own_names, "reader", "names no reader", "no target layer"),
    own("has a reader that fails", pickled, "reader", "OSError: not mine", "savers.py, line", reader=cannot_read),
    own("has a reader of lists", pickled, "reader", "a list", "{component: {layer: ΔW}}", reader=reads_lists),
    own("has no such reader", pickled, "reader", "No module named 'not_there'", reader="not_there:read"),
    breaker("forgets alpha", forgets_alpha, "gives_back", "(several)", "0.6 times", "5 / 3"),
    breaker("forgets a layer", forgets_a_layer, "gives_back", "the file has no unet.", "every layer"),
    own("changes another layer", changes_another_layer, "gives_back", "not in the request", "text_encoder.invented"),
    own("gives ΔW transposed", pickled, "gives_back", "comes back", "of its size off", reader=transposed),
    breaker("knows SDXL's names alone", knows_sdxl_alone, "gives_back", "of a 'sd15' LoRA", "request.layout"),
    breaker("notes its path", notes_its_path, "reproducible", "other bytes", "paths"),
    breaker("counts files", counts, "reproducible", "other bytes", "write_safetensors"),
    breaker("knows ASCII only", ascii_only, "names", "UnicodeEncodeError", "the prompt", "🦉"),
    breaker("replaces spaces in the path", no_spaces, "names", "the path", "wrote nothing"),
    breaker("raises for another family", looks_up_sdxl, "runs", "KeyError: 'sd15'", "whatever the model family"),
    breaker("raises", raises, "runs", "ValueError: no disk", "savers.py, line"),
]
