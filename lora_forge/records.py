"""The specs (records) that hooks yield: what a plugin supplies, described without importing it.

A spec is light: a name, a line of text, the type of its options, and a *factory* that is named as a
dotted string (`"package.module:Name"`) or given as a callable. Listing, showing and resolving plugins
therefore never import torch.

Whatever the kind, a factory gives a callable of one argument (`lora_forge.contracts` has each). A
factory that is a class is constructed with the options, and the instance is called; a factory that is
a function is that callable, and gets the options as the keyword `options` if it takes one.

New fields of a spec always come with a default.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

NEEDS: tuple[str, ...] = ("text", "noise_prediction", "attention", "vae")


@dataclass(frozen=True)
class NoOptions:
    """The options of a plugin that has none."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What all specs share.

    name: lower-case letters, digits, `_` and `-`; what a user types.
    summary: one line.
    factory: a callable, or `"package.module:attribute"`.
    options: a dataclass type whose fields are the options; a field's metadata may hold `help`,
        `min`, `max` (inclusive bounds) and `above` (exclusive lower bound).
    """

    kind: ClassVar[str]

    name: str
    summary: str
    factory: str | Callable[..., Any]
    options: type = NoOptions


@dataclass(frozen=True, kw_only=True)
class InitializerSpec(Spec):
    """Supplies the initial A and B of a target layer; see `lora_forge.contracts.Initializer`.

    gradient: it is given the objective's first gradient (`InitialLayer.gradient`), which takes a forward and a
        backward pass before the first step.
    """

    kind: ClassVar[str] = "initializer"

    gradient: bool = False


@dataclass(frozen=True, kw_only=True)
class LossSpec(Spec):
    """Supplies one term of the objective; see `lora_forge.contracts.Loss`.

    needs: what has to be there: a subset of `text`, `noise_prediction`, `attention`, `vae`, or a
        callable of the options that returns one.
    formula, source: what it computes, and the paper or project it comes from (`ours` if neither).
    capturable: it does the same operations on the same tensors at every step (no noise, no branch on a value), so
        that on CUDA a step may be recorded once and replayed.
    tokens: `content` if it reads no output, token or mask beyond a text's end token, nor compares texts position by
        position. Where all losses of a run say so, and the encoders are causal, what it is given may end with the
        longest of the texts it asks for; the values are the same.
    closed_form: what the factory gives has a method `solve` too (`lora_forge.contracts.Solver`), which is called in
        place of the step loop where this is the objective's only term.
    """

    kind: ClassVar[str] = "loss"

    needs: Collection[str] | Callable[[Any], Collection[str]] = frozenset({"text"})
    formula: str = ""
    source: str = "ours"
    capturable: bool = False
    tokens: Literal["all", "content"] = "all"
    closed_form: bool = False

    def needs_for(self, options: Any) -> frozenset[str]:
        """The needs under these options."""
        return frozenset(self.needs(options) if callable(self.needs) else self.needs)


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec(Spec):
    """Supplies a `torch.optim.Optimizer`; see `lora_forge.contracts.OptimizerFactory`.

    elementwise: it treats every number alone (Adam, SGD, Lion). One instance then steps the whole
        bank; otherwise each prompt gets an instance of its own over its own matrices.

    Options derived from `lora_forge.schedules.ScheduleOptions` give it a learning-rate schedule. An option `lr`
    is filled from the model config's `learning_rate`, unless its field's metadata has `model_config` False.
    """

    kind: ClassVar[str] = "optimizer"

    elementwise: bool = False


@dataclass(frozen=True, kw_only=True)
class SaverSpec(Spec):
    """Writes one prompt's LoRA weights to a file or a folder; see `lora_forge.contracts.Saver`.

    suffix: what its files' names end in.
    folder: it fills a folder, whose name has no suffix unless `suffix` says one.
    reader: reads a file, or a folder, back, for `lora_forge.testing.check_saver`: called with its path, gives ΔW of
        each layer, `{component: {layer: (out, in)}}`. A callable or `"package.module:attribute"`; not needed for
        safetensors files with the layer names lora-forge itself writes, nor for PEFT's folders.
    needs_layout: it names layers by the family's `BackendSpec.layout`, so that it cannot write a family without
        one; a run that asks for that ends before its first step.
    """

    kind: ClassVar[str] = "saver"

    suffix: str = ".safetensors"
    folder: bool = False
    reader: str | Callable[[Path], Mapping[str, Mapping[str, Any]]] | None = None
    needs_layout: bool = False


@dataclass(frozen=True, kw_only=True)
class FileLayout:
    """The LoRA file that user interfaces load whole for a model family: names of its layers, and its metadata.

    prefixes: for each component, what names of its layers start with, such as `lora_te1`.
    ldm_names: the components whose layers go by their names in the original checkpoints (CompVis
        latent-diffusion's blocks) instead of diffusers'.
    metadata: what user interfaces file such a LoRA by, such as `ss_base_model_version`.
    """

    prefixes: Mapping[str, str]
    ldm_names: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BackendSpec(Spec):
    """Knows one model family; see `lora_forge.contracts.Backend`.

    components: all that can carry LoRA. encoders: the text encoders among them, in order.
    reaches: for each need this backend can serve, the components an objective with that need can
        send a gradient to. A need that is not a key cannot be served.
    conditioning: the names of what `Backend.conditioning` gives when all encoders are in use.
    layout: how the saver `safetensors` writes the family's files; without one, it has no names for the layers.
    recognizes: a callable of a source, or `"package.module:attribute"`, that tells whether it is a model of
        this family, without reading weights; it may raise ModelError to say why not. Used where nobody named a
        backend; without one, the backend has to be named.
    tiny: a source of a small model that the backend makes on the spot, without a download; what
        `lora_forge.testing.check_backend` opens.
    """

    kind: ClassVar[str] = "backend"

    components: tuple[str, ...] = ()
    encoders: tuple[str, ...] = ()
    reaches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    conditioning: tuple[str, ...] = ()
    layout: FileLayout | None = None
    recognizes: str | Callable[[str], bool] | None = None
    tiny: str = ""


@dataclass(frozen=True, kw_only=True)
class ExecutorSpec(Spec):
    """Carries out the batches of a job, here or on other machines; see `lora_forge.contracts.Executor`.

    local: its workers run in the process that asked, so that the batch size can be chosen by this machine's memory.
    """

    kind: ClassVar[str] = "executor"

    local: bool = False
