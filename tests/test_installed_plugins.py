"""Broken, slow and conflicting distributions, installed by pip: what every command does beside them."""

from __future__ import annotations

import json
import re

import plugin_scenarios
import pytest
from plugin_scenarios import COMMANDS, HELP, LIST, LIST_JSON, LOADING, MODELS, REFERENCE, RUN, Outcome, Scenario

pytestmark = pytest.mark.slow

SCENARIOS = plugin_scenarios.scenarios(sleep=1.2)
BROKEN = tuple(one for one in SCENARIOS if one.reason)
NAMED = {one.key: one for one in SCENARIOS}
each_scenario = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda one: one.key)
each_broken = pytest.mark.parametrize("scenario", BROKEN, ids=lambda one: one.key)


class Carried:
    """What came of every command in a scenario's environment; each environment is made once."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory
        self._outcomes: dict[str, dict[str, Outcome]] = {}

    def out(self, scenario: Scenario) -> dict[str, Outcome]:
        if scenario.key not in self._outcomes:
            self._outcomes[scenario.key] = scenario.carry_out(self._factory.mktemp(scenario.key))
        return self._outcomes[scenario.key]


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> Carried:
    return Carried(tmp_path_factory)


def _timeless(text: str) -> str:
    return re.sub(r"[\d.]+ steps/s|\d+ s left", "-", text)


def _names(scenario: Scenario, text: str) -> bool:
    return any(name in text for name in scenario.distributions)


def test_without_plugins_every_command_succeeds_and_a_run_writes_a_file(carried: Carried) -> None:
    reference = carried.out(REFERENCE)
    assert {command: reference[command].code for command in COMMANDS} == dict.fromkeys(COMMANDS, 0)
    assert len(reference[RUN].file) == 64
    assert [command for command in reference if reference[command].file] == [RUN]


@each_scenario
def test_nothing_a_plugin_does_at_import_comes_out_of_main(scenario: Scenario, carried: Carried) -> None:
    outcomes = carried.out(scenario)
    assert {command: one.raised for command, one in outcomes.items() if one.raised} == {}


@each_scenario
@pytest.mark.parametrize("command", LOADING)
def test_a_command_that_does_not_ask_for_it_goes_on_but_for_one_line(
    scenario: Scenario, command: str, carried: Carried
) -> None:
    without, outcome = carried.out(REFERENCE)[command], carried.out(scenario)[command]
    assert (outcome.code, _timeless(outcome.stdout)) == (without.code, _timeless(without.stdout))
    lines = outcome.stderr.splitlines(keepends=True)
    assert re.fullmatch(scenario.line, "".join(line for line in lines if _names(scenario, line))), outcome.stderr
    rest = "".join(line for line in lines if not _names(scenario, line))
    assert _timeless(rest) == _timeless(without.stderr)


@each_scenario
def test_the_file_of_a_run_is_the_same_to_the_byte_beside_it(scenario: Scenario, carried: Carried) -> None:
    assert carried.out(scenario)[RUN].file == carried.out(REFERENCE)[RUN].file


@each_scenario
@pytest.mark.parametrize("command", [HELP, MODELS])
def test_a_command_that_needs_no_plugin_says_nothing_of_it(scenario: Scenario, command: str, carried: Carried) -> None:
    without, outcome = carried.out(REFERENCE)[command], carried.out(scenario)[command]
    assert (outcome.code, outcome.stdout, outcome.stderr) == (without.code, without.stdout, without.stderr)


@each_scenario
def test_help_imports_none_of_it(scenario: Scenario, carried: Carried) -> None:
    assert carried.out(scenario)[HELP].imported == []


def test_the_slow_one_is_imported_by_what_loads_plugins(carried: Carried) -> None:
    outcomes = carried.out(NAMED["slow"])
    assert [command for command in COMMANDS if outcomes[command].imported] == [LIST, LIST_JSON, *LOADING]


@each_scenario
def test_the_list_has_all_that_it_had_without_it(scenario: Scenario, carried: Carried) -> None:
    without, outcome = carried.out(REFERENCE)[LIST_JSON], carried.out(scenario)[LIST_JSON]
    rows = json.loads(outcome.stdout)["plugins"]
    assert outcome.code == 0
    assert [row for row in rows if row["distribution"] not in scenario.distributions] == json.loads(without.stdout)[
        "plugins"
    ]


@each_scenario
def test_the_list_says_it_in_its_output_and_nothing_on_stderr(scenario: Scenario, carried: Carried) -> None:
    outcomes = carried.out(scenario)
    assert [outcomes[command].stderr for command in (LIST, LIST_JSON)] == ["", ""]
    assert outcomes[LIST].code == 0
    assert all(name in outcomes[LIST].stdout for name in scenario.distributions), outcomes[LIST].stdout


@each_broken
def test_the_list_gives_a_broken_one_a_line_with_the_cause(scenario: Scenario, carried: Carried) -> None:
    without, listed = carried.out(REFERENCE)[LIST], carried.out(scenario)[LIST]
    lines = listed.stdout.splitlines(keepends=True)
    (line,) = (one for one in lines if _names(scenario, one))
    (name,) = scenario.distributions
    assert re.fullmatch(rf"broken: {name}:plugin 1\.0: {scenario.reason}\n", line)
    assert "".join(one for one in lines if one != line) == without.stdout
    (broken,) = json.loads(carried.out(scenario)[LIST_JSON].stdout)["broken"]
    assert (broken["plugin"], broken["version"]) == (f"{name}:plugin", "1.0")
    assert re.fullmatch(scenario.reason, broken["error"])


def test_the_list_says_what_the_slow_one_took(carried: Carried) -> None:
    outcomes = carried.out(NAMED["slow"])
    assert re.search(r"^slow: forge-slow:plugin: took \d+\.\d s to import$", outcomes[LIST].stdout, re.MULTILINE)
    assert [one["plugin"] for one in json.loads(outcomes[LIST_JSON].stdout)["slow"]] == ["forge-slow:plugin"]


def test_the_list_says_who_conflicts_with_whom_and_who_shadows_nothing(carried: Carried) -> None:
    status = {
        (row["distribution"], row["name"]): row["status"]
        for key in ("conflict", "builtin")
        for row in json.loads(carried.out(NAMED[key])[LIST_JSON].stdout)["plugins"]
    }
    assert "conflicts with forge-moon:wonder" in status["forge-dusk", "wonder"]
    assert "conflicts with forge-dusk:wonder" in status["forge-moon", "wonder"]
    assert "shadows nothing" in status["forge-builtin", "embedding_magnitude"]
    assert status["lora-forge", "embedding_magnitude"] == "ok"


@each_broken
def test_a_name_that_may_have_come_from_a_broken_one_is_refused_with_the_cause(
    scenario: Scenario, carried: Carried
) -> None:
    asked = carried.out(scenario)[plugin_scenarios.asking("wonder")]
    error = asked.stderr[asked.stderr.index("lora-forge: error: ") :]
    (name,) = scenario.distributions
    assert asked.code == 2
    assert "unknown loss 'wonder'" in error
    assert re.search(rf"it may have come from {name}:plugin, which is broken: {scenario.reason}\n", error), error


def test_a_name_of_two_is_refused_with_how_to_pick_and_either_can_be_picked(carried: Carried) -> None:
    outcomes = carried.out(NAMED["conflict"])
    asked = outcomes[plugin_scenarios.asking("wonder")]
    assert asked.code == 2
    assert "say which: 'forge-dusk:wonder' or 'forge-moon:wonder'" in asked.stderr
    for name in ("forge-dusk", "forge-moon"):
        picked = outcomes[plugin_scenarios.asking(f"{name}:wonder")]
        assert (picked.code, picked.stderr) == (0, "")
        assert f"[{name} 1.0]" in picked.stdout


def test_a_name_of_a_builtin_means_the_builtin_and_the_other_can_be_picked(carried: Carried) -> None:
    outcomes = carried.out(NAMED["builtin"])
    bare = outcomes[plugin_scenarios.asking("embedding_magnitude")]
    picked = outcomes[plugin_scenarios.asking("forge-builtin:embedding_magnitude")]
    assert (bare.code, bare.stderr, picked.code, picked.stderr) == (0, "", 0, "")
    assert bare.stdout == carried.out(REFERENCE)[plugin_scenarios.DRY_RUN].stdout
    assert "[forge-builtin 1.0]" in picked.stdout


def test_the_slow_one_works_when_asked_for(carried: Carried) -> None:
    asked = carried.out(NAMED["slow"])[plugin_scenarios.asking("wonder")]
    assert asked.code == 0
    assert "[forge-slow 1.0]" in asked.stdout
    assert re.fullmatch(NAMED["slow"].line, asked.stderr)


@each_scenario
@pytest.mark.parametrize("command", [plugin_scenarios.STRICT, plugin_scenarios.STRICT_RUN])
def test_strict_plugins_refuses_a_broken_one_by_name_and_nothing_else(
    scenario: Scenario, command: str, carried: Carried
) -> None:
    outcome = carried.out(scenario)[command]
    if not scenario.reason:
        assert outcome.code == 0, outcome.stderr
        return
    (name,) = scenario.distributions
    assert outcome.code == 2
    assert re.search(rf"error: .*broken plugins.*\n  {name}:plugin: {scenario.reason}\n", outcome.stderr)
    assert outcome.stdout == ""
