"""A Ray cluster for the tests of a module: two processors, as Ray counts them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Ray would kill workers for what else fills this machine's memory.
os.environ["RAY_memory_monitor_refresh_ms"] = "0"  # noqa: SIM112


@pytest.fixture(scope="module")
def two_processors() -> Iterator[None]:
    import fake_workers
    import ray
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(fake_workers)  # the tests are not installed where workers are
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=2**27)
    yield
    ray.shutdown()
    cloudpickle.unregister_pickle_by_value(fake_workers)
