"""One worker in a process of its own, somewhere in the cluster: what Ray makes an actor of."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from lora_forge.contracts import Worker
from lora_forge.errors import RunFailed

# Ray calls it on as many threads at once: a batch being saved, one being trained, and `close`.
CONCURRENCY = 3


class WorkerActor:
    """Trains on one thread and saves on another, whichever of Ray's threads calls."""

    def __init__(self, make_worker: Callable[[], Worker]) -> None:
        self._make_worker = make_worker
        self._worker: Worker | None = None
        self._closed = False
        self._training = ThreadPoolExecutor(1, "train")
        self._saving = ThreadPoolExecutor(1, "save")

    def carry_out(self, task: Any) -> Any:
        """Train and save a task; its outcome. What the worker raises can be pickled."""
        try:
            return self._training.submit(self._train, task).result().result()
        except Exception as error:
            raise _portable(error) from error

    def close(self) -> None:
        """Close the worker after what is being trained and saved; begins no other task."""
        self._closed = True
        self._training.submit(self._close).result()

    def _train(self, task: Any) -> Future[Any]:
        if self._closed:
            raise RunFailed("the job has ended")
        if self._worker is None:
            self._worker = self._make_worker()
        return self._saving.submit(self._worker.save, self._worker.train(task))

    def _close(self) -> None:
        self._saving.shutdown()
        if self._worker is not None:
            self._worker.close()


def _portable(error: Exception) -> Exception:
    """The error itself, or one that says the same where it does not come through pickle."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RunFailed(f"{type(error).__name__}: {error}")
    return error
