"""What `--executor-opt` sets."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Options:
    address: str = field(
        default="",
        metadata={
            "help": "the cluster: auto (the one this machine is in) or HOST:PORT; empty: one on this machine, for this "
            "job alone"
        },
    )
    workers: int = field(
        default=0, metadata={"help": "how many at most, each with a model; 0: as many as there is room for", "min": 0}
    )
    gpus_per_worker: float | None = field(
        default=None,
        metadata={"help": "GPUs, or a part of one, for each worker; none: 1 where the cluster has any", "min": 0},
    )
    retries: int = field(
        default=3, metadata={"help": "how often a batch is run again after its worker has died", "min": 0}
    )
