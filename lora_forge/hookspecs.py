"""Every extension point and every lifecycle event: one hook each.

A plugin is a module with functions of these names, marked with `lora_forge.hookimpl`, and found
through the entry-point group `lora_forge` (or given as a file with `--plugin`). A function whose
hook exists only in a later release is marked `@hookimpl(optionalhook=True)`. The module may say which
version of the plugin API it is built for, `__lora_forge_api__ = 1`, above its imports.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

from lora_forge.records import BackendSpec, ExecutorSpec, InitializerSpec, LossSpec, OptimizerSpec, SaverSpec, Spec

if TYPE_CHECKING:
    from lora_forge.events import RunFailure, RunFinish, RunStart, StepFinish

PROJECT = "lora_forge"
# Versions of the plugin API this release speaks, oldest first; a plugin says its own in `__lora_forge_api__`.
SPOKEN_APIS = (1,)
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def lora_forge_initializers() -> Iterable[InitializerSpec]:
    """Yield the initializers this plugin supplies.

    ```python
    import torch
    from lora_forge import InitializerSpec, hookimpl

    def ones(layer):
        return torch.ones(layer.rank, layer.in_features), torch.zeros(layer.out_features, layer.rank)

    @hookimpl
    def lora_forge_initializers():
        yield InitializerSpec(name="ones", summary="A of ones, B of zeros", factory=ones)
    ```
    """
    raise NotImplementedError


@hookspec
def lora_forge_losses() -> Iterable[LossSpec]:
    """Yield the losses this plugin supplies.

    ```python
    from lora_forge import LossSpec, hookimpl

    def quiet(batch):
        return sum(out.last_hidden_state.square().mean((1, 2)) for out in batch.adapted().values())

    @hookimpl
    def lora_forge_losses():
        yield LossSpec(name="quiet", summary="small embeddings", needs={"text"}, factory=quiet)
    ```
    """
    raise NotImplementedError


@hookspec
def lora_forge_optimizers() -> Iterable[OptimizerSpec]:
    """Yield the optimizers this plugin supplies.

    ```python
    import torch
    from lora_forge import OptimizerSpec, hookimpl

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.1)

    @hookimpl
    def lora_forge_optimizers():
        yield OptimizerSpec(name="sgd", summary="plain descent", factory=sgd, elementwise=True)
    ```
    """
    raise NotImplementedError


@hookspec
def lora_forge_savers() -> Iterable[SaverSpec]:
    """Yield the savers this plugin supplies.

    ```python
    import torch
    from lora_forge import SaverSpec, hookimpl

    def pt(request):
        torch.save({"prompt": request.prompt, "weights": request.weights}, request.path)

    @hookimpl
    def lora_forge_savers():
        yield SaverSpec(name="pt", summary="a torch file", factory=pt, suffix=".pt")
    ```
    """
    raise NotImplementedError


@hookspec
def lora_forge_backends() -> Iterable[BackendSpec]:
    """Yield the backends this plugin supplies.

    ```python
    from lora_forge import BackendSpec, hookimpl

    @hookimpl
    def lora_forge_backends():
        yield BackendSpec(
            name="my_family",
            summary="one text encoder and nothing else",
            factory="my_package.backend:MyBackend",
            components=("text_encoder",),
            encoders=("text_encoder",),
            reaches={"text": ("text_encoder",)},
            conditioning=("text_encoder last",),
        )
    ```
    """
    raise NotImplementedError


@hookspec
def lora_forge_executors() -> Iterable[ExecutorSpec]:
    """Yield the executors this plugin supplies.

    ```python
    from lora_forge import ExecutorSpec, hookimpl

    def plain(request):
        worker = request.make_worker()
        try:
            for task in request.tasks:
                request.report(worker.save(worker.train(task)))
        finally:
            worker.close()

    @hookimpl
    def lora_forge_executors():
        yield ExecutorSpec(name="plain", summary="one batch after another", factory=plain)
    ```
    """
    raise NotImplementedError


@hookspec
def lora_forge_run_started(event: RunStart) -> None:
    """Observe that a run (one prompt) is about to take its first step.

    ```python
    from lora_forge import hookimpl

    @hookimpl
    def lora_forge_run_started(event):
        print(event.run.prompt)
    ```
    """


@hookspec
def lora_forge_step_finished(event: StepFinish) -> None:
    """Observe one step's values. They come in order, some steps late, in chunks.

    ```python
    from lora_forge import hookimpl

    @hookimpl
    def lora_forge_step_finished(event):
        print(event.step, event.loss, event.terms)
    ```
    """


@hookspec
def lora_forge_run_finished(event: RunFinish) -> None:
    """Observe a run's result; its file, if one was asked for, is in place.

    ```python
    from lora_forge import hookimpl

    @hookimpl
    def lora_forge_run_finished(event):
        print(event.result.path, event.result.loss_after)
    ```
    """


@hookspec
def lora_forge_run_failed(event: RunFailure) -> None:
    """Observe that a run ended in an error; nothing was written.

    ```python
    from lora_forge import hookimpl

    @hookimpl
    def lora_forge_run_failed(event):
        print(event.run.prompt, event.error)
    ```
    """


# Discovery, resolution and `plugins list` read this table: a new extension point is a row and a hookspec.
EXTENSION_POINTS: dict[str, tuple[str, type[Spec]]] = {
    "initializer": ("lora_forge_initializers", InitializerSpec),
    "loss": ("lora_forge_losses", LossSpec),
    "optimizer": ("lora_forge_optimizers", OptimizerSpec),
    "saver": ("lora_forge_savers", SaverSpec),
    "backend": ("lora_forge_backends", BackendSpec),
    "executor": ("lora_forge_executors", ExecutorSpec),
}
LIFECYCLE_EVENTS: tuple[str, ...] = (
    "lora_forge_run_started",
    "lora_forge_step_finished",
    "lora_forge_run_finished",
    "lora_forge_run_failed",
)
