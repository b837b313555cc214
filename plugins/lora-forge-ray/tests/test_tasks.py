"""What becomes of tasks, of workers that die, and of the cluster, with workers that train nothing."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from fake_workers import CannotOpen, FakeWorker, Outcome, Task
from lora_forge_ray import lora_forge_executors
from lora_forge_ray.cluster import room
from lora_forge_ray.executor import execute
from lora_forge_ray.options import Options

from lora_forge.contracts import ExecutorRequest
from lora_forge.errors import PluginError, RunFailed
from lora_forge.testing import check_executor

cluster = pytest.mark.usefixtures("two_processors")


def carry_out(
    tasks: list[Task], folder: Path, report: Callable[[Outcome], None], threads: int = 1, **options: Any
) -> None:
    execute(ExecutorRequest(functools.partial(FakeWorker, folder), tasks, report, threads), Options(**options))


def begun(folder: Path) -> Counter[int]:
    """How often each task was begun."""
    return Counter(int(path.name.partition("-")[0]) for path in folder.iterdir() if path.name[0].isdigit())


def await_next_task_of(process: int, folder: Path) -> None:
    while len([*folder.glob(f"*-{process}-*")]) < 2:
        time.sleep(0.01)


@cluster
def test_it_keeps_the_contract_of_an_executor() -> None:
    (spec,) = lora_forge_executors()
    check_executor(spec)


@cluster
def test_a_killed_worker_costs_what_it_had_in_hand_and_that_runs_again(tmp_path: Path) -> None:
    reported: list[Outcome] = []

    def report(outcome: Outcome) -> None:
        reported.append(outcome)
        if len(reported) == 1:
            await_next_task_of(outcome.process, tmp_path)
            os.kill(outcome.process, signal.SIGKILL)

    carry_out([Task(number, seconds=0.3) for number in range(8)], tmp_path, report)
    assert sorted(outcome.number for outcome in reported) == list(range(8))
    again = [number for number, times in begun(tmp_path).items() if times > 1]
    assert len(again) == 1


@cluster
def test_a_batch_that_kills_every_worker_ends_the_job_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="a batch was lost with its worker 2 times"):
        carry_out([Task(0, does="die"), Task(1)], tmp_path, lambda outcome: None, retries=1)
    assert begun(tmp_path)[0] == 2


@cluster
def test_a_worker_that_died_is_started_again(tmp_path: Path) -> None:
    reported: list[Outcome] = []

    def report(outcome: Outcome) -> None:
        reported.append(outcome)
        if len(reported) in (1, 3):
            os.kill(outcome.process, signal.SIGKILL)

    carry_out([Task(number, seconds=0.1) for number in range(6)], tmp_path, report, workers=1)
    assert sorted(outcome.number for outcome in reported) == list(range(6))
    assert len({outcome.process for outcome in reported}) == 3


@cluster
def test_an_error_that_pickle_cannot_carry_ends_the_job_with_its_words(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="Stubborn: it stopped because it wanted to"):
        carry_out([Task(0, does="raise"), Task(1)], tmp_path, lambda outcome: None)
    assert begun(tmp_path)[0] == 1


@cluster
def test_a_worker_that_cannot_be_made_ends_the_job_with_the_reason() -> None:
    request = ExecutorRequest(CannotOpen, [Task(0)], lambda outcome: None, 1)
    with pytest.raises(FileNotFoundError, match="this machine has no such model"):
        execute(request, Options())


@cluster
def test_each_worker_gets_a_task_before_one_gets_two_and_has_the_threads_it_reserves(tmp_path: Path) -> None:
    reported: list[Outcome] = []
    carry_out([Task(0, does="meet"), Task(1, does="meet")], tmp_path, reported.append)
    assert len({outcome.process for outcome in reported}) == 2
    assert {outcome.threads for outcome in reported} == {"1"}
    reported.clear()
    carry_out([Task(0), Task(1)], tmp_path, reported.append, threads=2)
    assert len({outcome.process for outcome in reported}) == 1, "two threads each: one has room"
    assert {outcome.threads for outcome in reported} == {"2"}


@cluster
def test_a_cluster_that_was_there_before_is_left_as_it_was(tmp_path: Path) -> None:
    carry_out([Task(0)], tmp_path, lambda outcome: None)
    assert ray.is_initialized()
    with pytest.raises(KeyboardInterrupt):
        carry_out([Task(0), Task(1, seconds=60)], tmp_path, interrupt)
    assert ray.get(ray.remote(num_cpus=2)(lambda: "all processors are free").remote(), timeout=20)


def interrupt(outcome: Outcome) -> None:
    raise KeyboardInterrupt


@cluster
@pytest.mark.parametrize(("threads", "options"), [(3, {}), (1, {"gpus_per_worker": 1})])
def test_a_cluster_without_room_for_a_worker_is_an_error_that_says_what_one_takes(
    threads: int, options: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(PluginError, match=r"no machine .* room for a worker, which takes (3 CPU|1 CPU and 1 GPU)"):
        carry_out([Task(0)], tmp_path, lambda outcome: None, threads=threads, **options)


@pytest.mark.parametrize(
    ("machines", "need", "count"),
    [
        ([{"CPU": 8.0}], {"CPU": 2.0}, 4),
        ([{"CPU": 3.0}, {"CPU": 3.0}], {"CPU": 2.0}, 2),
        ([{"CPU": 64.0, "GPU": 8.0}, {"CPU": 64.0}], {"CPU": 1.0, "GPU": 1.0}, 8),
        ([{"CPU": 64.0, "GPU": 2.0}], {"CPU": 1.0, "GPU": 0.4}, 4),
        ([{"CPU": 64.0, "GPU": 3.0}], {"CPU": 1.0, "GPU": 2.0}, 1),
        ([{"memory": 1e9}], {"CPU": 1.0}, 0),
    ],
)
def test_workers_fit_whole_on_machines_and_on_gpus(
    machines: list[dict[str, float]], need: dict[str, float], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [{"Alive": True, "Resources": has} for has in machines]
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}}])
    assert room(need) == count
