"""A LoRA in a pipeline of diffusers for a while: whole, or refused; and the pipeline left as it was found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lora_forge.errors import LoraFileError, ModelError
from lora_forge.files.formats import diffusers_tensors, lay_out
from lora_forge.files.layer_tensors import Layers, named_keys

if TYPE_CHECKING:
    import torch
    from torch import nn

ADAPTER = "lora_forge_preview"
_A, _B = ".lora_A.weight", ".lora_B.weight"


def adapter_tensors(layers: Layers) -> dict[str, torch.Tensor]:
    """What diffusers loads of these layers: its own spelling, without those of zeros unless all are."""
    moving = {key: one for key, one in layers.items() if bool(one.up.any())}  # others take time, and change nothing
    return diffusers_tensors(lay_out(moving or layers, "diffusers").layers)


def check_bare(pipeline: Any) -> None:
    """Raises ModelError for a pipeline that carries a LoRA, or no way to load one."""
    if not hasattr(pipeline, "load_lora_weights"):
        raise ModelError(f"{type(pipeline).__name__} takes no LoRA: it has no load_lora_weights")
    for name, module in _modules(pipeline).items():
        if hasattr(module, "peft_config"):
            raise ModelError(f"{name} already carries a LoRA; unload it first (pipe.unload_lora_weights())")


@contextmanager
def lora_in(pipeline: Any, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Within this the pipeline has the LoRA as its adapter `ADAPTER`; afterwards not, also after an error.

    tensors: in diffusers' spelling. Raises LoraFileError, naming layers, for those that the pipeline has not, that are
    of another size there, or that diffusers does not load.
    """
    modules = _modules(pipeline)
    names = [key.removesuffix(_A) for key in tensors if key.endswith(_A)]
    layers = {name: (tensors[name + _A], tensors[name + _B]) for name in names}
    _check_fit(modules, layers, type(pipeline).__name__)
    found = _Found(modules)
    try:
        _load(pipeline, {**tensors, **_stand_ins(modules, layers)})
        if missing := [name for name in layers if ADAPTER not in getattr(_module_of(modules, name), "lora_A", {})]:
            raise LoraFileError(f"diffusers loads only part of this LoRA, and leaves out {named_keys(missing)}")
        yield
    finally:
        pipeline.unload_lora_weights()
        found.restore()


class _Found:
    """What loading and unloading a LoRA changes of modules beside their layers, as it was found."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.own = [(module, dict(vars(module))) for module in modules.values()]  # libraries leave notes there
        self.training = [(child, child.training) for module in modules.values() for child in module.modules()]
        self.trained = [(one, one.requires_grad) for module in modules.values() for one in module.parameters()]

    def restore(self) -> None:
        for module, before in self.own:
            for name in vars(module).keys() - before.keys():
                del vars(module)[name]
            vars(module).update(before)
        for child, flag in self.training:
            child.training = flag
        for parameter, required in self.trained:
            parameter.requires_grad_(required)


def _load(pipeline: Any, tensors: dict[str, torch.Tensor]) -> None:
    try:
        with _without_progress():
            pipeline.load_lora_weights(tensors, adapter_name=ADAPTER)
    except Exception as error:  # diffusers', transformers' and PEFT's own, of no common type
        raise LoraFileError(f"diffusers does not load this LoRA: {' '.join(str(error).split())}") from error


def _stand_ins(modules: Mapping[str, nn.Module], layers: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """A layer of zeros for each text encoder that has layers, and none of its attention: diffusers needs one there."""
    import torch

    made = {}
    for component, module in modules.items():
        own = [name for name in layers if name.startswith(f"{component}.")]
        attention = [path for path, _ in module.named_modules() if path.endswith(".self_attn.out_proj")]
        if own and attention and not any(".self_attn." in name for name in own):
            rank = layers[own[0]][0].shape[0]
            weight: Any = module.get_submodule(attention[0]).weight
            out, into = weight.shape
            made[f"{component}.{attention[0]}{_A}"] = torch.zeros(rank, into)
            made[f"{component}.{attention[0]}{_B}"] = torch.zeros(out, rank)
    return made


@contextmanager
def _without_progress() -> Iterator[None]:
    """transformers shows a bar for the weights of each text encoder."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _modules(pipeline: Any) -> dict[str, nn.Module]:
    from torch import nn

    parts = getattr(pipeline, "components", {})
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def _module_of(modules: Mapping[str, nn.Module], name: str) -> Any:
    """The module a layer's name, `component.canonical.path`, means; None where there is none."""
    component, _, path = name.partition(".")
    module = modules.get(component)
    for one in (path, path.removeprefix("text_model.")):  # transformers 5.6 dropped this level of CLIPTextModel
        try:
            return module.get_submodule(one) if module is not None else None
        except AttributeError:
            continue
    return None


def _check_fit(modules: Mapping[str, nn.Module], layers: Mapping[str, Any], kind: str) -> None:
    absent, other = [], []
    for name, (down, up) in layers.items():
        weight = getattr(_module_of(modules, name), "weight", None)
        if weight is None:
            absent.append(name)
        elif (up.shape[0], *down.shape[1:]) != tuple(weight.shape):
            other.append(name)
    if absent:
        raise LoraFileError(f"{kind} has not these layers of the LoRA: {named_keys(absent)}")
    if other:
        raise LoraFileError(f"in {kind} these layers of the LoRA are of another size: {named_keys(other)}")
