"""Examining a backend with a LoRA in its model, and after it was taken out."""

from __future__ import annotations

import math

import torch

from lora_forge.errors import ModelError
from lora_forge.preview.adapter import check_bare
from lora_forge.testing.backend_model import ATTENTION, Model, Outputs, check_same, compare_rows
from lora_forge.testing.compare import OTHER_MATES, TOGETHER, listed, relative, same_bits
from lora_forge.testing.examination import Book, Broken
from lora_forge.testing.stage import adapt
from lora_forge.training.objective import backward
from lora_forge.training.reach import Reach

_FILE = "out/my lora.safetensors"


def examine_adapted(book: Book, model: Model, frozen: Outputs) -> None:
    """The rules from `adapt_zero` on; the model is loaded and bare, and `frozen` what it says."""
    before = {path: _types(module) for path, module in model.modules().items()}
    modules = model.modules()
    with book.rule("adapt_zero", vital=True):
        adapt(model.backend, model.layers, model.slot)
        model.fill(TOGETHER, zero_b=True)
        check_same(frozen, model.outputs(TOGETHER), "with B = 0 in every layer the adapted model gives another %s")
    with book.rule("weight_norm"):
        _check_norms(model)
    with book.rule("adapt", vital=True):
        _check_adapted(model, frozen)
    with book.rule("independent", vital=True):
        _check_independent(model)
    for need in model.spec.reaches:
        with book.rule("reaches"):
            _check_reach(model, need)
    with book.rule("release"):
        model.fill(TOGETHER)
        model.backend.release()
        for path, types in before.items():
            if left := [name for name, kind in _types(modules[path]).items() if types.get(name) is not kind]:
                raise Broken(f"after release() {len(left)} layers of {path} are not what they were, {left[0]} for one")
        model.backend.load(model.spec.components)
        again = model.outputs_with_gradient(TOGETHER)
        check_same(frozen, again, "after release() and load() the model gives another %s: a LoRA is left in it")
        if trained := [name for name, tensor in again.items() if tensor.requires_grad]:
            raise Broken(f"after release() and load(), {listed(trained)} has a gradient: something is left unfrozen")
    with book.rule("usage"):
        lines = model.backend.usage(_FILE, "a steampunk owl")
        if not isinstance(lines, str) or _FILE not in lines:
            raise Broken(f"usage() does not mention the file it is given, {_FILE!r}: {lines!r}")
    with book.rule("pipeline"):
        model.backend.release()
        _check_pipeline(model)


def _check_pipeline(model: Model) -> None:
    try:
        pipeline = model.backend.pipeline()
    except NotImplementedError:
        return
    missing = [name for name in model.spec.components if not isinstance(getattr(pipeline, name, None), torch.nn.Module)]
    if missing or not callable(pipeline):
        what = f"without {listed(missing, 9)}" if missing else "that cannot be called"
        raise Broken(
            f"pipeline() gives a {type(pipeline).__name__} {what}; give a whole one, or raise NotImplementedError"
        )
    try:
        check_bare(pipeline)
    except ModelError as error:
        raise Broken(f"no LoRA can be loaded into what pipeline() gives: {error}") from error


def _types(module: torch.nn.Module) -> dict[str, type]:
    return {name: type(child) for name, child in module.named_modules()}


def _check_norms(model: Model) -> None:
    for layer in model.layers:
        norm = model.backend.weight_norm(*layer.key)
        if not isinstance(norm, int | float) or not math.isfinite(norm) or norm <= 0:
            raise Broken(
                f"the norm of the frozen weight of {'.'.join(layer.key)} is {norm!r} once it is loaded and adapted"
            )


def _check_adapted(model: Model, frozen: Outputs) -> None:
    model.fill(TOGETHER)
    assert model.slot.bank is not None
    with torch.no_grad():
        for pair in model.slot.bank.pairs.values():
            pair.lora_B[1:] = 0
    adapted = model.outputs(TOGETHER)
    for name, tensor in adapted.items():
        for row in (1, 2):
            if (share := relative(tensor[row], frozen[name][row])) > 0:
                raise Broken(
                    f"the {name} of prompt {row + 1}, whose own B is zero, changes by {share:.2g} of it: "
                    "rows come in prompts-major order, and each prompt's through its own A and B (lora_forge.bank)"
                )
    for name, tensor in adapted.items():
        if same_bits(tensor[0], frozen[name][0]):
            raise Broken(f"with B ≠ 0 in every layer the {name} does not change: adapt() put nothing in its way")
    if left := model.not_adapted():
        raise Broken(f"adapt() left out {len(left)} of the {len(model.layers)} layers it was given: {listed(left)}")
    with model.slot.frozen():
        still = model.outputs(TOGETHER)
    check_same(frozen, still, "within slot.frozen() the model is not the frozen one, but gives another %s")


def _check_independent(model: Model) -> None:
    model.fill(TOGETHER)
    together = model.outputs(TOGETHER)
    for row, person in enumerate(TOGETHER):
        model.fill([person])
        compare_rows(together, row, model.outputs([person]), 0, "alone, with the same LoRA", exact=False)
    model.fill(OTHER_MATES)
    compare_rows(together, 0, model.outputs(OTHER_MATES), 0, "beside other prompts, with the same LoRA", exact=True)


def _check_reach(model: Model, need: str) -> None:
    """What a need gives a loss. A VAE, which no LoRA is in, gives nothing that could reach a layer."""
    if need == "vae":
        if model.spec.reaches[need]:
            raise Broken(
                f"reaches['vae'] declares {listed(model.spec.reaches[need])}; a VAE has no LoRA in it: declare ()"
            )
        return
    model.fill(TOGETHER)
    assert model.slot.bank is not None
    reach = Reach(model.slot.bank)
    outputs = model.outputs_with_gradient(TOGETHER)
    given = {"noise_prediction": "predicted noise", "attention": ATTENTION}
    beyond_text = tuple(given.values())
    used = [
        tensor
        for name, tensor in outputs.items()
        if (name.startswith(given[need]) if need in given else not name.startswith(beyond_text))
    ]
    total = sum(tensor.square().mean() for tensor in used)
    if not isinstance(total, torch.Tensor) or not total.requires_grad:
        raise Broken(f"what a loss with the need {need!r} gets has no gradient at all")
    backward(total)
    reached, declared = {component for component, _ in reach.reached}, set(model.spec.reaches[need])
    if missing := sorted(declared - reached):
        raise Broken(f"reaches[{need!r}] declares {listed(missing)}, but no gradient arrives at a layer of it")
    if extra := sorted(reached - declared):
        raise Broken(f"a gradient arrives at {listed(extra)}, which reaches[{need!r}] does not declare")
