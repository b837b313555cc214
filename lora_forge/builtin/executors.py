"""Built-in executors: here, one batch after another, saving one while the next computes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from lora_forge import ExecutorSpec, hookimpl
from lora_forge.contracts import ExecutorRequest, Worker


def local(request: ExecutorRequest) -> None:
    """Train on this thread, and save and report on one other."""
    worker = request.make_worker()
    try:
        with ThreadPoolExecutor(1, "save") as saving:
            earlier: Future[None] | None = None
            for task in request.tasks:
                trained = worker.train(task)
                if earlier:
                    earlier.result()  # what went wrong in saving ends the job; one batch at most waits to be saved
                earlier = saving.submit(_save, request, worker, trained)
                del trained
            if earlier:
                earlier.result()
    finally:
        worker.close()


def _save(request: ExecutorRequest, worker: Worker, trained: Any) -> None:
    request.report(worker.save(trained))


@hookimpl
def lora_forge_executors() -> Iterator[ExecutorSpec]:
    yield ExecutorSpec(
        name="local",
        summary="on this machine, in this process; a batch is saved while the next one trains",
        factory=local,
        local=True,
    )
