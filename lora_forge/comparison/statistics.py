"""What numbers of several prompts and seeds can tell, and what is within their noise.

Prompts are the independent units: what seeds of one prompt gave is averaged first. Two objectives are compared over the
pairs of prompt and seed that both have.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from lora_forge.errors import UsageError

LEVEL = 0.05  # of the tests; intervals cover the rest
_MOST_EXACT = 300  # differences
Values: TypeAlias = Mapping[tuple[str, int], float]  # by prompt and seed
Outcome: TypeAlias = Literal["higher", "lower", "within noise", "tests disagree", "too few prompts", "no values"]


@dataclass(frozen=True)
class Interval:
    """A mean over prompts, and its 95 % confidence interval; one prompt alone has none."""

    mean: float
    low: float | None
    high: float | None
    prompts: int


@dataclass(frozen=True)
class Paired:
    """The difference of two objectives over the prompts they share: the first's value taken from the other's.

    p_t, p_wilcoxon: of a paired t test and of Wilcoxon's signed-rank test, both two-sided, corrected by Holm's method
    for the others of their family; None where there are fewer than two prompts. The difference is `higher` or `lower`
    where both are below 0.05, `within noise` where neither is, `no values` where one of the two has none, and
    `too few prompts` where `least` is not below 0.05.
    least: the smallest p that Wilcoxon's test could give for so many prompts, corrected as the smallest of its family.
    relative: the mean difference, as a share of the first's mean over the same prompts; None where that is 0. What is
    beyond noise may still be too small to matter.
    """

    difference: Interval | None
    relative: float | None
    p_t: float | None
    p_wilcoxon: float | None
    least: float | None
    outcome: Outcome

    @property
    def differs(self) -> bool:
        return self.outcome in ("higher", "lower")


def check_installed() -> None:
    """Raises UsageError where scipy is missing."""
    _scipy()


def interval(values: Values) -> Interval | None:
    """The mean over prompts, with Student's t interval; None of no values."""
    return _interval(list(_by_prompt(values).values()))


def paired_family(pairs: Sequence[tuple[Values, Values]]) -> list[Paired]:
    """For each pair, what the second has more than the first; all of them are one family for Holm's correction."""
    shared = [_shared(*pair) for pair in pairs]
    differences = [[second - first for first, second in both] for both in shared]
    p_t = holm([_t_test(one) for one in differences])
    p_wilcoxon = holm([_wilcoxon(one) for one in differences])
    tested = sum(len(one) > 1 for one in differences)
    made = []
    for one, both, by_t, by_ranks in zip(differences, shared, p_t, p_wilcoxon, strict=True):
        least = min(1.0, tested * 2.0 ** (1 - len(one))) if by_ranks is not None else None
        mean = _interval(one)
        made.append(Paired(mean, _relative(both), by_t, by_ranks, least, _outcome(mean, by_t, by_ranks, least)))
    return made


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction (Holm 1979); what is None was not tested, and counts for nothing."""
    order = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for done, (p, place) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - done) * p))
        corrected[place] = largest
    return corrected


def _outcome(difference: Interval | None, p_t: float | None, p_wilcoxon: float | None, least: float | None) -> Outcome:
    if difference is None:
        return "no values"
    if p_t is None or p_wilcoxon is None:
        return "too few prompts"
    if least is not None and least >= LEVEL:  # ranks could not have told, however large the difference
        return "too few prompts"
    by_t, by_ranks = p_t < LEVEL, p_wilcoxon < LEVEL
    if by_t != by_ranks:
        return "tests disagree"
    if not by_t:
        return "within noise"
    return "higher" if difference.mean > 0 else "lower"


def _by_prompt(values: Values) -> dict[str, float]:
    """The mean over a prompt's seeds."""
    groups: dict[str, list[float]] = {}
    for (prompt, _), value in values.items():
        groups.setdefault(prompt, []).append(value)
    return {prompt: math.fsum(own) / len(own) for prompt, own in groups.items()}


def _shared(first: Values, second: Values) -> list[tuple[float, float]]:
    """Both values of each prompt, over the seeds that both have."""
    common = [key for key in second if key in first]
    firsts, seconds = (_by_prompt({key: values[key] for key in common}) for values in (first, second))
    return [(firsts[prompt], seconds[prompt]) for prompt in firsts]


def _relative(both: Sequence[tuple[float, float]]) -> float | None:
    whole = abs(math.fsum(first for first, _ in both))
    return math.fsum(second - first for first, second in both) / whole if whole else None


def _interval(values: Sequence[float]) -> Interval | None:
    if not values:
        return None
    mean, deviation = _moments(values)
    if len(values) == 1:
        return Interval(mean, None, None, 1)
    half = float(_scipy().stdtrit(len(values) - 1, 1 - LEVEL / 2)) * deviation / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, len(values))


def _moments(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, of one value 0."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(1, len(values) - 1))


def _t_test(differences: Sequence[float]) -> float | None:
    """Two-sided p of a paired t test; where all differences are one number, that is noise only if it is 0."""
    if len(differences) < 2:
        return None
    mean, deviation = _moments(differences)
    if deviation == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * _scipy().stdtr(len(differences) - 1, -abs(mean) * math.sqrt(len(differences)) / deviation))


def _wilcoxon(differences: Sequence[float]) -> float | None:
    """Two-sided p of Wilcoxon's signed-rank test, without the differences that are 0 (Wilcoxon 1945).

    Up to 300 of them exactly, over all ways to sign these ranks, of which ties share their mean.
    """
    if len(differences) < 2:
        return None
    moved = sorted((one for one in differences if one != 0), key=abs)
    if not moved:
        return 1.0
    if len(moved) > _MOST_EXACT:
        from scipy import stats

        return float(stats.wilcoxon(moved).pvalue)
    ranks = _doubled_ranks(moved)
    positive = sum(rank for rank, one in zip(ranks, moved, strict=True) if one > 0)
    return min(1.0, 2 * _up_to(min(positive, sum(ranks) - positive), ranks))


def _doubled_ranks(ordered: Sequence[float]) -> list[int]:
    """Twice the rank of each by size, which is whole for ties too."""
    sizes = [abs(one) for one in ordered]
    return [bisect_left(sizes, size) + bisect_right(sizes, size) + 1 for size in sizes]


def _up_to(most: int, ranks: Sequence[int]) -> float:
    """The probability that ranks of random signs have positive ones with a sum of at most this."""
    import numpy

    chances = numpy.zeros(most + 1)
    chances[0] = 1.0
    for rank in ranks:
        moved = numpy.zeros_like(chances)
        moved[rank:] = chances[: max(0, len(chances) - rank)]
        chances = (chances + moved) / 2
    return float(chances.sum())


def _scipy() -> Any:
    try:
        from scipy import special
    except ImportError as error:
        raise UsageError("comparing objectives needs scipy: pip install lora-forge[lab]") from error
    return special
