"""The executor: as many actors as fit, two batches in flight for each, so that one is saved while the next trains.

Placing them, and restarting those that died, is Ray's. What they had in hand goes to whoever is first: Ray's own
`max_task_retries` waits for the same actor to return, and is used up within a second while a machine is gone and Ray
does not know it.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from lora_forge.contracts import ExecutorRequest
from lora_forge.errors import PluginError, RunFailed
from lora_forge_ray.actor import CONCURRENCY, WorkerActor
from lora_forge_ray.cluster import cluster, resources, room
from lora_forge_ray.options import Options

_IN_FLIGHT = 2  # for each worker
_GRACE = 10.0  # seconds that workers are given to close


def execute(request: ExecutorRequest, options: Options) -> None:
    """Carry out all tasks on the cluster.

    Raises what a worker raised, RunFailed for a batch that was lost with its worker too often, PluginError for a
    cluster that cannot be reached or has no room for a worker.
    """
    if not request.tasks:
        return
    with cluster(options, request.threads):
        actors = _actors(request, options)
        try:
            _Job(request, options.retries, actors).run()
        finally:
            for actor in actors:
                ray.kill(actor)


def _actors(request: ExecutorRequest, options: Options) -> list[Any]:
    need = resources(options, request.threads)
    places = room(need)
    if not places and not (options.workers and options.address):
        wanted = " and ".join(f"{amount:g} {name}" for name, amount in need.items())
        raise PluginError(
            f"no machine of the Ray cluster has room for a worker, which takes {wanted}; a cluster that grows on "
            "demand is told how many to make room for: --executor-opt workers=N"
        )
    # Ray sets OMP_NUM_THREADS to the processors reserved, unless told; a worker's values depend on its threads.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(request.threads))
    actor = ray.remote(WorkerActor).options(
        num_cpus=need["CPU"],
        num_gpus=need.get("GPU", 0),
        max_concurrency=CONCURRENCY,
        max_restarts=-1,
        runtime_env={"env_vars": threads},
    )
    return [actor.remote(request.make_worker) for _ in range(min(options.workers or places, len(request.tasks)))]


class _Job:
    """Which actor has which tasks, by their numbers.

    starting: what is answered once an actor's process is there. there: actors that are. given: what is answered with
    the outcome of a task. losses: how often a task was lost with its worker.
    """

    def __init__(self, request: ExecutorRequest, retries: int, actors: list[Any]) -> None:
        self.request, self.retries = request, retries
        self.tasks = deque(range(len(request.tasks)))
        self.starting: dict[Any, Any] = {}
        self.there: list[Any] = []
        self.given: dict[Any, tuple[Any, int]] = {}
        self.losses: Counter[int] = Counter()
        for actor in actors:
            self._await(actor)

    def run(self) -> None:
        """Give each worker tasks while there are any, report what comes back, and close the workers."""
        try:
            while self.tasks or self.given:
                (done,), _ = ray.wait([*self.starting, *self.given])
                if done in self.starting:
                    self._started(done)
                else:
                    self._take(done)
                for in_flight in range(1, _IN_FLIGHT + 1):  # one for each, before anyone gets a second
                    for actor in self.there:
                        self._give(actor, in_flight)
        except Exception:
            self._close()
            raise
        self._close()

    def _await(self, actor: Any) -> None:
        self.starting[actor.__ray_ready__.options(max_task_retries=-1).remote()] = actor

    def _started(self, done: Any) -> None:
        try:
            ray.get(done)
        except RayError as error:
            raise RunFailed(f"a worker cannot be started; Ray says: {_line(error)}") from error
        self.there.append(self.starting.pop(done))

    def _give(self, actor: Any, in_flight: int) -> None:
        held = sum(holder == actor for holder, _ in self.given.values())
        # Of the tasks to be held beside another, one is left for each worker that has yet to start.
        if held < in_flight and len(self.tasks) > (len(self.starting) if held else 0):
            number = self.tasks.popleft()
            self.given[actor.carry_out.remote(self.request.tasks[number])] = actor, number

    def _take(self, done: Any) -> None:
        actor, number = self.given.pop(done)
        try:
            outcome = ray.get(done)
        except RayTaskError as error:  # what the worker raised; Ray's text has where
            raise error.cause from error
        except RayError as error:
            self._lose(actor, number, error)
        else:
            self.request.report(outcome)

    def _lose(self, actor: Any, number: int, error: RayError) -> None:
        self.losses[number] += 1
        if self.losses[number] > self.retries:
            times = f" {self.losses[number]} times" if self.retries else ""
            raise RunFailed(f"a batch was lost with its worker{times}; Ray says: {_line(error)}") from error
        self.tasks.appendleft(number)
        if actor in self.there:
            self.there.remove(actor)
            self._await(actor)

    def _close(self) -> None:
        """Have workers close, for a while at most; who died or is busy is killed afterwards."""
        if self.there:
            closing = [actor.close.remote() for actor in self.there]
            ray.wait(closing, num_returns=len(closing), timeout=_GRACE)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
