"""Examining a backend, on the tiny model that it makes itself: first the frozen model, then with a LoRA in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from lora_forge.bank import BankSlot
from lora_forge.builtin.backends import lora_forge_backends
from lora_forge.contracts import Backend, BackendRequest, TargetLayer
from lora_forge.plugins import attribute_named
from lora_forge.records import NEEDS, BackendSpec, FileLayout, Spec
from lora_forge.testing.backend_adapted import examine_adapted
from lora_forge.testing.backend_denoiser import examine_denoiser
from lora_forge.testing.backend_model import Model, Outputs, check_same, compare_rows
from lora_forge.testing.compare import FIRST_SEED, OTHER_MATES, SECOND_SEED, TOGETHER, listed, shape_of
from lora_forge.testing.examination import Book, Broken, global_seed, in_words

_NO_MODEL = "this is no model"
_TEXTS = ("a steampunk owl", "", "ein Käse 🦉")


def examine_backend(book: Book, spec: BackendSpec, options: Any, make: Callable[[], Callable[..., Any]]) -> None:
    """See `lora_forge.testing.RULES`."""
    with book.rule("record", vital=True):
        _check_declared(spec)
    with book.rule("tiny", vital=True):
        if not isinstance(spec.tiny, str) or not spec.tiny:
            raise Broken(
                "its record names no tiny model: give BackendSpec(tiny='…'), a source that the backend makes on the "
                "spot, small and with deterministic random weights, so that it can be examined without a download"
            )
    model = _open(book, spec, make)
    examine_adapted(book, model, _examine_frozen(book, model))


def _check_declared(spec: BackendSpec) -> None:
    if not spec.components:
        raise Broken("it declares no components: what of the model can carry a LoRA")
    if foreign := sorted(set(spec.encoders) - set(spec.components)):
        raise Broken(f"its encoders {listed(foreign)} are not among its components, {listed(spec.components, 9)}")
    if spec.layout:
        _check_layout(spec, spec.layout)
    if unknown := sorted(set(spec.reaches) - set(NEEDS)):
        raise Broken(f"`reaches` speaks of {listed(unknown)}: no such need; there are {', '.join(NEEDS)}")
    for need, components in spec.reaches.items():
        if foreign := sorted(set(components) - set(spec.components)):
            raise Broken(f"reaches[{need!r}] names {listed(foreign)}, not among its components")


def _check_layout(spec: BackendSpec, layout: FileLayout) -> None:
    if foreign := sorted((set(layout.prefixes) | set(layout.ldm_names)) - set(spec.components)):
        raise Broken(f"its layout speaks of {listed(foreign)}, not among its components")
    if missing := sorted(set(spec.components) - set(layout.prefixes)):
        raise Broken(f"its layout has no prefix for {listed(missing)}: LoRAs of it could not be saved")


def _open(book: Book, spec: BackendSpec, make: Callable[[], Callable[..., Any]]) -> Model:
    backend: Any = None
    with book.rule("opens", vital=True):
        try:
            backend = make()(BackendRequest(spec.tiny, "cpu", "float32"))
        except (Exception, SystemExit) as error:
            raise Broken(f"it cannot open its own tiny model {spec.tiny!r}: {in_words(error)}") from error
        if not isinstance(backend, Backend):
            raise Broken(f"its factory gives a {type(backend).__name__}, not a lora_forge.contracts.Backend")
        if not isinstance(getattr(backend, "family", None), str) or not backend.family:
            raise Broken("it names no family: set family = '…', which savers name layers by")
    with book.rule("opens"):
        _check_recognized(spec)
        _check_claimed(spec, [*lora_forge_backends(), *book.beside])
    layers: list[TargetLayer] = []
    with book.rule("architecture", vital=True):
        layers = _layers(spec, backend.architecture())
    with book.rule("target_groups"):
        _check_groups(backend, layers)
    with book.rule("weight_norm", vital=True):
        norm = backend.weight_norm(*layers[0].key)
        if norm is not None:
            raise Broken(f"before load() the norm of {'.'.join(layers[0].key)} is {norm}; give None, nothing is loaded")
    with book.rule("opens", vital=True):
        backend.check_files(spec.components)
    return Model(spec, backend, tuple(layers), BankSlot())


def _check_recognized(spec: BackendSpec) -> None:
    """What `recognizes` says, if there is one, of the tiny model, and of what is no model at all."""
    if spec.recognizes is None:
        return
    try:
        recognizes = attribute_named(spec.recognizes)
        known = recognizes(spec.tiny)
    except (Exception, SystemExit) as error:
        raise Broken(f"its `recognizes` fails on its own tiny model {spec.tiny!r}: {in_words(error)}") from error
    if not known:
        raise Broken(f"its `recognizes` does not know its own tiny model {spec.tiny!r}")
    with suppress(Exception):  # an error is a no with a reason
        if recognizes(_NO_MODEL):
            known = False
    if not known:
        raise Broken(f"its `recognizes` says yes to {_NO_MODEL!r}: it would claim every base model, of any family")


def _check_claimed(spec: BackendSpec, backends: Sequence[Spec]) -> None:
    """What the backends that are there say of the tiny model: where two recognize it, neither is taken for it."""
    for other in backends:
        if other == spec or not isinstance(other, BackendSpec) or None in (spec.recognizes, other.recognizes):
            continue
        claims = False
        with suppress(Exception, SystemExit):  # an error is a no with a reason
            claims = bool(attribute_named(other.recognizes or "")(spec.tiny))
        if claims:
            raise Broken(
                f"its tiny model {spec.tiny!r} is recognized by backend {other.name!r} too, so that neither is taken "
                "for it: give the tiny model another name, and have `recognizes` ask for what this family alone has"
            )


def _layers(spec: BackendSpec, architecture: Any) -> list[TargetLayer]:
    if not isinstance(architecture, Mapping) or set(architecture) != set(spec.components):
        got = listed(sorted(architecture), 9) if isinstance(architecture, Mapping) else type(architecture).__name__
        raise Broken(f"architecture() lists {got}; its record declares the components {listed(spec.components, 9)}")
    layers = []
    for component, sizes in architecture.items():
        if not sizes:
            raise Broken(f"architecture() lists no linear layer of {component}")
        for name, size in sizes.items():
            if not (isinstance(size, tuple | list) and [type(one) for one in size] == [int, int] and min(size) > 0):
                raise Broken(f"the size of {component}.{name} is {size!r}; give (out, in), two positive integers")
            layers.append(TargetLayer(component, name, *size))
    return layers


def _check_groups(backend: Backend, layers: Sequence[TargetLayer]) -> None:
    groups = getattr(backend, "target_groups", None)
    if not isinstance(groups, Mapping) or not groups:
        raise Broken("it has no target_groups: name a choice of layers for model configs, such as 'attention'")
    for name, choose in groups.items():
        if not any(choose(layer.name) for layer in layers):
            raise Broken(f"target group {name!r} selects none of the {len(layers)} layers")


def _examine_frozen(book: Book, model: Model) -> Outputs:
    """Returns the frozen model's outputs."""
    with book.rule("frozen", vital=True):
        model.backend.load(model.spec.components)
        _check_frozen(model)
    for encoder in model.spec.encoders:
        with book.rule("tokens", vital=True):
            _check_tokens(model.backend, encoder)
    with book.rule("encode", vital=True):
        model.check_encode(TOGETHER)
    with book.rule("conditioning", vital=True):
        _check_conditioning(model)
    examine_denoiser(book, model)
    frozen: Outputs = {}
    with book.rule("frozen", vital=True):
        frozen = model.outputs_with_gradient(TOGETHER)
        if trained := [name for name, tensor in frozen.items() if tensor.requires_grad]:
            raise Broken(f"without a LoRA, {listed(trained)} has a gradient: load() has to freeze all parameters")
    with book.rule("deterministic", vital=True):
        for seed, when in ((FIRST_SEED, "run twice"), (SECOND_SEED, "under another global seed (torch.manual_seed)")):
            with global_seed(seed):
                again = model.outputs(TOGETHER)
            check_same(
                frozen, again, f"{when}, the frozen model gives another %s; put it in eval() mode, without dropout"
            )
    with book.rule("independent", vital=True):
        _check_independent(model)
    return frozen


def _check_independent(model: Model) -> None:
    """Each alone, and the first beside others, as things stand: frozen, or adapted."""
    together = model.outputs(TOGETHER)
    for row, person in enumerate(TOGETHER):
        compare_rows(together, row, model.outputs([person]), 0, "alone", exact=False)
    compare_rows(together, 0, model.outputs(OTHER_MATES), 0, "beside other prompts", exact=True)


def _check_frozen(model: Model) -> None:
    for path, module in model.modules().items():
        if trained := [name for name, parameter in module.named_parameters() if parameter.requires_grad]:
            raise Broken(
                f"{len(trained)} parameters of {path} are not frozen, {trained[0]} for one: "
                "have load() call .requires_grad_(False).eval()"
            )


def _check_tokens(backend: Backend, encoder: str) -> None:
    tokens = backend.tokenize(encoder, _TEXTS)
    for name in ("input_ids", "attention_mask"):
        tensor = getattr(tokens, name)
        if not isinstance(tensor, torch.Tensor) or tensor.ndim != 2 or len(tensor) != len(_TEXTS):
            raise Broken(f"{name} of {encoder} has {shape_of(tensor)} for {len(_TEXTS)} texts; give (rows, length)")
        if tensor.dtype != torch.int64:
            raise Broken(f"{name} of {encoder} is {tensor.dtype}, not int64")
        if tensor.device.type != "cpu":
            raise Broken(f"{name} of {encoder} is on {tensor.device}; tokens are made on the CPU")
    if tokens.input_ids.shape != tokens.attention_mask.shape:
        shapes = f"{tuple(tokens.input_ids.shape)} and {tuple(tokens.attention_mask.shape)}"
        raise Broken(f"input_ids and attention_mask of {encoder} have different shapes, {shapes}")
    if not bool(((tokens.attention_mask == 0) | (tokens.attention_mask == 1)).all()):
        raise Broken(f"attention_mask of {encoder} holds other numbers than 0 and 1")
    if tuple(tokens.cut) != ("",) * len(_TEXTS):
        raise Broken(f"for texts that fit, cut of {encoder} is {tokens.cut!r}; give one '' for each")
    long = backend.tokenize(encoder, ["owl " * 5000])
    if long.input_ids.shape[1] != tokens.input_ids.shape[1]:
        lengths = f"{long.input_ids.shape[1]} tokens of a long text, {tokens.input_ids.shape[1]} of a short one"
        raise Broken(f"{encoder} makes {lengths}; cut and pad all texts to the encoder's length")
    if len(long.cut) != 1 or not long.cut[0]:
        raise Broken(f"for a text of 5000 words cut of {encoder} is {long.cut!r}; give the text that did not fit")


def _check_conditioning(model: Model) -> None:
    outputs = model.encode(TOGETHER, masked=False)
    for given in (outputs, *({encoder: output} for encoder, output in outputs.items() if len(outputs) > 1)):
        of = f"of {', '.join(given)}"
        parts = model.backend.conditioning(given)
        if not isinstance(parts, dict) or not parts:
            raise Broken(f"conditioning() {of} is {parts!r}; give tensors by name, also when encoders are missing")
        if given is outputs and tuple(parts) != tuple(model.spec.conditioning):
            raise Broken(
                f"conditioning() {of} gives {listed(list(parts), 9)}; its record declares conditioning="
                f"{tuple(model.spec.conditioning)}, which `plugins show` tells: let them say the same"
            )
        for name, tensor in parts.items():
            if not isinstance(tensor, torch.Tensor) or tensor.ndim < 2 or len(tensor) != len(TOGETHER):
                got = f"{shape_of(tensor)} for {len(TOGETHER)} prompts"
                raise Broken(f"{name!r} of conditioning() {of} has {got}; the first dimension is prompts")
