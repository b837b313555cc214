"""Intervals and paired tests, against numbers by hand and against counting every case."""

from __future__ import annotations

import itertools
import math
import random
import statistics as by_standard_library
import sys
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lora_forge.comparison.statistics import Paired, Values, check_installed, holm, interval, paired_family
from lora_forge.errors import UsageError

# Student (1908): what a drug added to the sleep of ten patients, in hours, and another drug to that of the same.
SLEEP = (0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0), (1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4)


def prompts(values: Sequence[float]) -> Values:
    """A value per prompt, of one seed."""
    return {(f"prompt {number}", 0): value for number, value in enumerate(values)}


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    (one,) = paired_family([(prompts(first), prompts(second))])
    return one


def wilcoxon_by_counting(differences: Sequence[float]) -> float:
    """Of all ways to give the ranks signs, the share that is as one-sided as this one, either way."""
    sizes = [abs(one) for one in differences]
    ranks = [sum(other < one for other in sizes) + (sizes.count(one) + 1) / 2 for one in sizes]
    observed = sum(rank for rank, one in zip(ranks, differences, strict=True) if one > 0)
    far = abs(observed - sum(ranks) / 2)
    ways = [
        sum(rank for rank, positive in zip(ranks, signs, strict=True) if positive)
        for signs in itertools.product((True, False), repeat=len(ranks))
    ]
    return sum(abs(way - sum(ranks) / 2) >= far for way in ways) / len(ways)


def test_an_interval_is_students_by_hand() -> None:
    # sd of 1..5 is √2.5, t(0.975, 4) is 2.776445
    made = interval(prompts([1, 2, 3, 4, 5]))
    assert made is not None
    assert (made.mean, made.prompts) == (3, 5)
    half = 2.776445 * math.sqrt(2.5) / math.sqrt(5)
    assert (made.low, made.high) == pytest.approx((3 - half, 3 + half), rel=1e-6)


def test_seeds_of_a_prompt_are_averaged_first_so_that_more_seeds_are_not_more_prompts() -> None:
    few = interval({("owl", 0): 0.0, ("owl", 1): 2.0, ("cat", 0): 4.0})
    assert few == interval(prompts([1.0, 4.0]))
    many = interval({(name, seed): value for name, value in (("owl", 1.0), ("cat", 4.0)) for seed in range(50)})
    assert many == few


def test_one_prompt_has_a_mean_without_an_interval_and_none_has_nothing() -> None:
    one = interval({("owl", 0): 1.0, ("owl", 1): 2.0})
    assert one is not None
    assert (one.mean, one.low, one.high, one.prompts) == (1.5, None, None, 1)
    assert interval({}) is None


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    chance, held = random.Random(7), 0
    for _ in range(1000):
        made = interval(prompts([chance.gauss(3, 2) for _ in range(6)]))
        assert made
        assert made.low is not None
        assert made.high is not None
        held += made.low <= 3 <= made.high
    assert 925 <= held <= 975  # 950 are expected, and 7 are one standard deviation


def test_the_paired_t_test_gives_what_student_published() -> None:
    made = paired(*SLEEP)
    assert made.difference is not None
    assert made.difference.mean == pytest.approx(1.58)
    assert made.p_t == pytest.approx(0.00283289, rel=1e-5)
    assert made.outcome == "higher"
    assert paired(SLEEP[1], SLEEP[0]).outcome == "lower"


@pytest.mark.parametrize("count", [2, 5, 6, 9, 11])
def test_wilcoxons_test_gives_what_counting_every_case_gives(count: int) -> None:
    for seed in range(5):
        chance = random.Random(seed)
        for differences in (
            [chance.gauss(0.7, 1) for _ in range(count)],
            [chance.choice([-2.0, -1.0, 1.0, 2.0, 3.0]) for _ in range(count)],  # with ties
        ):
            made = paired([0.0] * count, differences)
            assert made.p_wilcoxon == pytest.approx(wilcoxon_by_counting(differences))


@pytest.mark.parametrize("count", [20, 50, 300, 301, 1000])
def test_wilcoxons_test_of_many_prompts_is_scipys(count: int) -> None:
    chance = random.Random(count)
    differences = [chance.gauss(0.1, 1) for _ in range(count)]
    expected = stats.wilcoxon(differences).pvalue
    assert paired([0.0] * count, differences).p_wilcoxon == pytest.approx(expected, rel=1e-9 if count <= 50 else 0.02)


def test_differences_of_zero_tell_wilcoxons_test_nothing() -> None:
    assert paired([0.0] * 8, [0, 0, 1, 2, 3, 4, 5, 6]).p_wilcoxon == pytest.approx(2 / 2**6)


def test_holms_correction_by_hand() -> None:
    # sorted 0.01, 0.02, 0.03, 0.2: times 4, 3, 2, 1, and none below the one before it
    assert holm([0.03, 0.01, 0.2, 0.02]) == pytest.approx([0.06, 0.04, 0.2, 0.06])
    assert holm([0.03, None, 0.01, None]) == pytest.approx([0.03, None, 0.02, None])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holms_correction_rejects_what_bonferronis_does_and_keeps_the_order(p_values: list[float]) -> None:
    corrected = [one for one in holm(p_values) if one is not None]
    assert all(p <= one <= min(1, len(p_values) * p) for p, one in zip(p_values, corrected, strict=True))
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    assert [corrected[place] for place in order] == sorted(corrected)


def test_a_family_is_corrected_together() -> None:
    alone = paired([0.0] * 10, [0.5, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    three = paired_family([(prompts([0.0] * 10), prompts([0.5, 1, 2, 3, 4, 5, 6, 7, 8, 9]))] * 3)
    assert alone.p_t is not None
    assert [one.p_t for one in three] == pytest.approx([3 * alone.p_t] * 3)
    assert alone.least == 2 / 2**10
    assert [one.least for one in three] == [3 * 2 / 2**10] * 3


def test_noise_is_called_a_difference_as_seldom_as_the_level_says() -> None:
    chance, found = random.Random(11), 0
    for _ in range(200):
        first, *others = ({(str(prompt), 0): chance.gauss(1, 0.1) for prompt in range(9)} for _ in range(6))
        found += any(one.differs for one in paired_family([(first, other) for other in others]))
    assert found <= 18  # of 200 families of five; 10 are expected at most, and 3 are one standard deviation


def test_only_pairs_of_prompt_and_seed_that_both_have_are_compared() -> None:
    first: Values = {("owl", 0): 1.0, ("owl", 1): 5.0, ("cat", 0): 2.0, ("dog", 0): 9.0}
    second: Values = {("owl", 0): 2.0, ("cat", 0): 5.0, ("cat", 1): 99.0, ("hen", 0): 0.0}
    (made,) = paired_family([(first, second)])
    assert made.difference == interval(prompts([1.0, 3.0]))
    assert made.relative == pytest.approx(4 / 3)  # 2 and 5, beside 1 and 2


def test_what_does_not_differ_is_within_noise_and_what_always_differs_by_one_number_is_not() -> None:
    same = paired([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6])
    assert (same.p_t, same.p_wilcoxon, same.outcome) == (1, 1, "within noise")
    always = paired([0] * 6, [0.5] * 6)
    assert (always.p_t, always.outcome) == (0, "higher")
    chance = random.Random(3)
    assert paired([0] * 20, [chance.gauss(0, 1) for _ in range(20)]).outcome == "within noise"


def test_where_one_test_alone_finds_a_difference_that_is_said_and_one_prompt_tells_nothing() -> None:
    few = paired([0] * 5, [1.0, 1.1, 0.9, 1.05, 0.95])  # Wilcoxon's test cannot go below 1 / 16
    assert few.p_t is not None
    assert few.p_t < 0.001
    assert (few.least, few.outcome) == (1 / 16, "too few prompts")
    several = paired([0] * 7, [1.0, 1.1, 0.9, 1.05, 0.95, 1.0, -0.01])
    assert several.least is not None
    assert (several.least < 0.05, several.outcome) == (True, "higher")
    torn = paired([0] * 8, [1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 1.2, 30.0])
    assert torn.p_t is not None
    assert torn.p_wilcoxon is not None
    assert (torn.p_t < 0.05) != (torn.p_wilcoxon < 0.05)
    assert torn.outcome == "tests disagree"
    one = paired([0], [1])
    assert (one.p_t, one.p_wilcoxon, one.least, one.outcome) == (None, None, None, "too few prompts")
    assert (paired([], []).difference, paired([], []).relative, one.relative) == (None, None, None)
    assert paired([], []).outcome == "no values"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(-100, 100), st.floats(-100, 100)), min_size=2, max_size=12))
def test_the_other_way_round_the_difference_is_the_same_with_the_other_sign(pairs: list[tuple[float, float]]) -> None:
    first, second = zip(*pairs, strict=True)
    one, other = paired(first, second), paired(second, first)
    assert one.difference
    assert other.difference
    assert (
        one.difference.mean
        == -other.difference.mean
        == pytest.approx(by_standard_library.mean([b - a for a, b in pairs]))
    )
    assert (one.p_t, one.p_wilcoxon) == pytest.approx((other.p_t, other.p_wilcoxon))
    turned = {"higher": "lower", "lower": "higher"}
    assert one.outcome == turned.get(other.outcome, other.outcome)


def test_without_scipy_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed()
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(UsageError, match=r"pip install lora-forge\[lab\]"):
        check_installed()
