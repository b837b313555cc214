"""The numbers and sentences of a comparison's report, from its results alone."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Mapping
from typing import Any

import pytest
from comparison_results import REACH, lifelike, results, specificity

from lora_forge.comparison.results import Cross, RandomControl, Results
from lora_forge.comparison.statistics import interval
from lora_forge.comparison.summary import OWN, Summary, summarize
from lora_forge.comparison.verdicts import interval_text, verdicts

NAMES = ("first", "second", "third", "chance")


@pytest.fixture(scope="module")
def made() -> Results:
    return lifelike(NAMES, 10, 3)


@pytest.fixture(scope="module")
def summary(made: Results) -> Summary:
    return summarize(made)


def mean_of(results: Results, name: str, read: Any) -> float:
    """Seeds of a prompt first, then prompts, in plain loops."""
    prompts: dict[str, list[float]] = {}
    for row in results.rows:
        if row.objective == name and row.measured is not None:
            prompts.setdefault(row.prompt, []).append(read(row.measured))
    return statistics.mean([statistics.mean(values) for values in prompts.values()])


def test_each_mean_is_over_prompts_of_means_over_seeds(made: Results, summary: Summary) -> None:
    for one in summary.objectives:
        reads = {
            "conditioning_shift": lambda lora: lora.conditioning_shift,
            "specificity": lambda lora: lora.specificity.ratio,
            "shift_controls": lambda lora: lora.specificity.controls,
            "delta_norm": lambda lora: lora.delta_norm,
            "seconds_per_step": lambda lora: lora.seconds_per_step,
            "loss_change": lambda lora: lora.loss.after - lora.loss.before,
            OWN: lambda lora: lora.cross[one.name].after - lora.cross[one.name].before,  # noqa: B023
        }
        for measure, read in reads.items():
            found = one.measures[measure]
            assert found is not None
            assert found.mean == pytest.approx(mean_of(made, one.name, read))
        of_random = one.random["shift_empty"]
        assert of_random is not None
        assert of_random.mean == pytest.approx(mean_of(made, one.name, lambda lora: lora.random.specificity.empty))
        assert one.peak_memory == 300_000_000
        assert one.objective.reach == REACH


def test_the_cross_table_has_changes_and_shares_of_what_ones_own_training_does(made: Results, summary: Summary) -> None:
    whole = lifelike(NAMES, 10, 3)
    assert whole == made
    for one in summary.objectives:
        for name, cell in one.cross.items():
            if "third" in (one.name, name):  # of which a run failed: the share is of fewer prompts and seeds
                continue
            change = mean_of(made, one.name, lambda lora: lora.cross[name].after - lora.cross[name].before)  # noqa: B023
            own = mean_of(made, name, lambda lora: lora.cross[name].after - lora.cross[name].before)  # noqa: B023
            chance = mean_of(made, one.name, lambda lora: lora.cross[name].random - lora.cross[name].before)  # noqa: B023
            assert cell.change is not None
            assert cell.change.mean == pytest.approx(change)
            assert (cell.share, cell.random_share) == pytest.approx((change / own, chance / own))
        assert one.cross[one.name].share == 1


def test_a_share_is_of_the_prompts_and_seeds_that_both_have() -> None:
    def of(name: str, prompt: int, seed: int) -> Mapping[str, Any] | str:
        if (name, prompt) == ("first", 0):
            return "it broke"
        far = 10.0 if prompt == 0 else 1.0
        return {
            "cross": {other: Cross(0.0, -far if other == name else -far / 4, -0.1) for other in ("first", "second")}
        }

    first, second = summarize(results(("first", "second"), 3, 1, of)).objectives
    assert first.cross["second"].share == second.cross["first"].share == 0.25
    assert second.cross["second"].change == interval({("a", 0): -10.0, ("b", 0): -1.0, ("c", 0): -1.0})


def test_where_ones_own_training_brought_it_up_there_is_no_share() -> None:
    def of(name: str, prompt: int, seed: int) -> Mapping[str, Any]:
        return {"cross": {"first": Cross(1.0, 1.5, 1.0), "second": Cross(1.0, None, 1.0)}}

    first, second = summarize(results(("first", "second"), 3, 1, of)).objectives
    assert (first.cross["first"].share, second.cross["first"].share) == (None, None)
    assert (first.cross["second"].change, first.cross["second"].share) == (None, None)


def test_failed_runs_are_counted_named_and_in_none_of_the_numbers(summary: Summary) -> None:
    third = summary.objectives[2]
    assert (third.runs, third.failed) == (29, 1)
    assert third.errors == {"term 'third' became NaN in step 7": 1}
    assert verdicts(summary)[0] == "third: 1 of 30 runs failed, and are in none of the numbers."
    assert third.against_first["delta_norm"].difference is not None
    assert third.against_first["delta_norm"].difference.prompts == 10


def test_what_cannot_be_told_from_a_random_lora_is_named_and_so_is_what_differs_from_the_first(
    summary: Summary,
) -> None:
    said = verdicts(summary)
    assert [one.told_from_random for one in summary.objectives] == [True, True, True, False]
    assert said[1].startswith("chance: cannot be told from a random LoRA of equal norm")
    together = "conditioning shift higher and prompt specificity higher: first, second, third."
    assert said[2] == f"Against a random LoRA of equal norm, {together}"
    assert said[3].startswith("Conditioning shift, against first: ")
    assert "lower with chance (-" in said[3]
    assert said[4].startswith("Prompt specificity, against first: ")


def test_a_difference_beyond_noise_is_told_with_its_size_so_that_a_tiny_one_is_seen_to_be_tiny() -> None:
    def of(name: str, prompt: int, seed: int) -> Mapping[str, Any]:
        return {"conditioning_shift": 2.0 + prompt if name == "first" else (2.0 + prompt) * 1.0004}

    summary = summarize(results(("first", "alike"), 8, 1, of))
    assert summary.objectives[1].against_first["conditioning_shift"].relative == pytest.approx(0.0004)
    assert "Conditioning shift, against first: higher with alike (+0.04 %)." in verdicts(summary)


def test_one_objective_under_two_names_is_within_noise_of_itself() -> None:
    def of(name: str, prompt: int, seed: int) -> Mapping[str, Any]:
        chance = random.Random(f"{prompt}/{seed}")
        shift = chance.uniform(0.1, 0.2)
        return {"conditioning_shift": shift, "specificity": specificity(shift, chance.uniform(0.05, 0.06))}

    summary = summarize(results(("one", "same"), 12, 2, of))
    assert {paired.outcome for paired in summary.objectives[1].against_first.values()} == {"within noise"} | {
        "higher",  # its name is another, and so the value of its own objective
        "lower",
    }
    assert "Conditioning shift, against one: within noise: same." in verdicts(summary)


def test_where_nothing_moves_the_conditioning_the_own_objective_is_asked() -> None:
    still = specificity(0.0, 0.0)
    changes = {"conditioning_shift": 0.0, "specificity": still, "random": RandomControl(0.0, still)}

    def of(name: str, prompt: int, seed: int) -> Mapping[str, Any]:
        return changes | {"cross": {"deep": Cross(1.0, 0.5 + 0.01 * prompt, 0.9)}}

    (deep,) = summarize(results(("deep",), 8, 1, of)).objectives
    assert (deep.moves_conditioning, deep.told_from_random) == (False, True)
    assert deep.measures["specificity"] is None
    (said,) = verdicts(Summary((deep,)))
    told = "moves nothing of the conditioning, nor does a random LoRA; its own objective against that one's: lower"
    assert said.startswith(f"deep: {told}")


def test_few_prompts_are_said_to_be_few() -> None:
    few = summarize(lifelike(NAMES, 4, 3))
    assert "4 prompts are too few for Wilcoxon's test" in verdicts(few)[-1]
    one = summarize(lifelike(NAMES, 1, 3))
    assert "too few prompts to tell: second, third, chance" in " ".join(verdicts(one))
    assert "too few" not in verdicts(summarize(lifelike(NAMES, 10, 1)))[-1]


def test_a_curve_is_the_mean_since_the_first_step_and_a_run_that_stopped_stays_where_it_was() -> None:
    steps = {0: (5.0, 4.0, 1.0, 0.0), 1: (3.0, 2.0), 2: (1.0, None, 0.0)}

    def of(name: str, prompt: int, seed: int) -> Mapping[str, Any]:
        return {"steps": steps[prompt]}

    (one,) = summarize(results(("first",), 3, 2, of)).objectives
    assert one.curve is not None
    assert one.curve.steps == (1, 2, 3, 4)
    assert one.curve.start == 4  # the third has a step that is not known
    assert one.curve.mean == (0, -1, -2.5, -3)
    expected = interval({("a", 0): -4.0, ("b", 0): -1.0})
    assert expected is not None
    assert one.curve.low is not None
    assert one.curve.low[2] == pytest.approx(expected.low)
    (still,) = summarize(results(("first",), 3, 1, lambda name, prompt, seed: {"steps": ()})).objectives
    assert still.curve is None


def test_a_long_curve_keeps_its_ends_and_few_enough_points() -> None:
    steps = tuple(1 / (1 + step) for step in range(5000))
    (one,) = summarize(results(("first",), 2, 1, lambda name, prompt, seed: {"steps": steps})).objectives
    assert one.curve is not None
    assert (one.curve.steps[0], one.curve.steps[-1], len(one.curve.steps)) == (1, 5000, 200)
    assert one.curve.mean[-1] == pytest.approx(steps[-1] - 1)


def test_all_of_it_is_json(summary: Summary) -> None:
    told = json.loads(json.dumps(summary.as_dict(), allow_nan=False))
    assert [one["name"] for one in told["objectives"]] == list(NAMES)
    assert told["objectives"][3]["told_from_random"] is False
    assert told["objectives"][1]["against_first"]["specificity"]["outcome"] in ("higher", "within noise")
    assert told["objectives"][1]["cross"]["first"]["share"] == summary.objectives[1].cross["first"].share


def test_objectives_that_all_failed_have_no_numbers() -> None:
    summary = summarize(results(("first", "second"), 2, 1, lambda name, prompt, seed: "it broke"))
    for one in summary.objectives:
        assert (one.runs, one.failed, one.curve, one.peak_memory) == (0, 2, None, None)
        assert set(one.measures.values()) == {None}
    assert verdicts(summary)[0] == "first: 2 of 2 runs failed, and are in none of the numbers."


def test_an_interval_has_as_many_digits_as_its_width_deserves() -> None:
    values = {("a", 0): 0.10432, ("b", 0): 0.10632}
    assert interval_text(interval(values)) == "0.105 ± 0.013"
    assert interval_text(interval(values), signed=True, scale=1000) == "+105 ± 13"
    assert interval_text(interval({("a", 0): 0.123456})) == "0.1235"
    assert interval_text(interval({("a", 0): 1e-9, ("b", 0): 3e-9})) == "2e-09 ± 1.3e-08"
    assert interval_text(None) == "–"
