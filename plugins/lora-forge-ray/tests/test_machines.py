"""A cluster of two machines, of which one is lost; and clusters that are not there."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from pathlib import Path

import fake_workers
import pytest
import ray
from fake_workers import FakeWorker, Outcome, Task
from lora_forge_ray.executor import execute
from lora_forge_ray.options import Options
from ray import cloudpickle
from ray.cluster_utils import Cluster

from lora_forge.contracts import ExecutorRequest
from lora_forge.errors import PluginError


@pytest.fixture
def machines() -> Iterator[Cluster]:
    cloudpickle.register_pickle_by_value(fake_workers)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 2**27})
    cluster.add_node(num_cpus=1, object_store_memory=2**27)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()
    cloudpickle.unregister_pickle_by_value(fake_workers)


def test_what_was_lost_with_a_machine_runs_on_another(machines: Cluster, tmp_path: Path) -> None:
    reported: list[Outcome] = []
    lost = next(node for node in machines.list_all_nodes() if not node.head)
    losing = threading.Thread(target=machines.remove_node, args=(lost, False))

    def report(outcome: Outcome) -> None:
        reported.append(outcome)
        if len(reported) == 3:
            losing.start()

    tasks = [Task(number, seconds=0.4) for number in range(10)]
    request = ExecutorRequest(functools.partial(FakeWorker, tmp_path), tasks, report, 1)
    execute(request, Options(address=machines.address))
    losing.join()
    assert sorted(outcome.number for outcome in reported) == list(range(10))
    assert len({outcome.process for outcome in reported}) == 2
    assert not ray.is_initialized(), "the connection was the job's own"


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9"])
def test_a_cluster_that_does_not_answer_is_an_error_at_once(address: str) -> None:
    with pytest.raises(PluginError, match=f"a Ray cluster at '{address}' cannot be reached: .*refused"):
        execute(ExecutorRequest(FakeWorker, [Task(0)], print, 1), Options(address=address))
