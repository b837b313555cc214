"""What lifecycle observers are given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_forge.result import RunResult


@dataclass(frozen=True)
class RunInfo:
    """One run: one prompt. `id` is the same for the same request; `batch_id` names the bank it trains in."""

    id: str
    batch_id: str
    prompt: str
    model: str
    iterations: int
    seed: int


@dataclass(frozen=True)
class RunStart:
    """A run is about to take its first step.

    record: the resolved run as JSON-ready values, as the file's metadata holds it: rank, alpha, every
        plugin with its options and version, and so on.
    """

    run: RunInfo
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StepFinish:
    """One step (counted from 1): the objective before its update, each term unweighted, and L2.

    gradient_norms: per component, the Euclidean norm of the objective's gradient, without that of L2.
    """

    run: RunInfo
    step: int
    loss: float
    terms: Mapping[str, float]
    l2: float
    gradient_norms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RunFinish:
    """A run ended well."""

    run: RunInfo
    result: RunResult


@dataclass(frozen=True)
class RunFailure:
    """A run ended in an error."""

    run: RunInfo
    error: BaseException
