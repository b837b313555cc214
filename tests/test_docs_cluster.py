"""The figures on the page about clusters are those of the formulas on it and of the shipped model config."""

from __future__ import annotations

import re

import pytest
from docs_pages import DOCS

from lora_forge.config.model import read_model_config

TEXT = (DOCS / "batch-cluster.md").read_text(encoding="utf-8")
OPERATIONS = 4 * (0.085e9 + 0.65e9) * 77 * 50


def number(text: str) -> float:
    return float(text.replace(",", ""))


@pytest.mark.parametrize("row", re.findall(r"^\| [^|]+, (?:bfloat16|tf32) \| .+ \|$", TEXT, re.MULTILINE))
def test_prompts_per_hour_follow_from_the_rate(row: str) -> None:
    rate, cautious, usual, hours = map(number, re.findall(r"\| ([\d,.]+)(?= \|)", row))
    for utilisation, told in ((0.2, cautious), (0.4, usual)):
        assert told == pytest.approx(3600 * rate * 1e12 * utilisation / OPERATIONS, abs=51)
    assert hours == pytest.approx(1e6 / usual, abs=0.06)


def test_the_example_of_cost_follows_from_its_prices() -> None:
    told = r"cost (\d+) to compute, (\d+) to keep for a month and (\d+) to write.*?would be ([\d,]+) a month"
    found = re.search(told, TEXT, re.DOTALL)
    assert found
    prices = re.search(r"price_of_1000_writes = ([\d.]+), ([\d.]+), ([\d.]+)", TEXT)
    assert prices
    hour, month, writes = map(number, prices.groups())
    gpu_hours = 1e6 * OPERATIONS / (3600 * 989e12 * 0.4)
    expected = (gpu_hours * 1.1 * hour, 6.5 * month, 1000 * writes, 59.6 * month)
    assert [number(told) for told in found.groups()] == pytest.approx(expected, abs=0.51)


def test_bytes_are_those_of_the_shipped_layers() -> None:
    config = read_model_config("sdxl_base")
    sizes = {component: config.dimensions[component] for component in config.targets}
    rank = config.lora_rank
    encoders = [sum(layers[name]) for one, layers in sizes.items() if one != "unet" for name in config.targets[one]]
    everything = [sum(layers[name]) for one, layers in sizes.items() for name in config.targets[one]]
    for layers, words in ((everything, "all 736"), (encoders, "the 176 of the text encoders")):
        assert words.split()[1] == str(len(layers))
        row = re.search(rf"^\| {words}.* \| ([\d,]+) \| ([\d.]+) MB \| ([\d.]+) MB \|$", TEXT, re.MULTILINE)
        assert row
        assert number(row[1]) == rank * sum(layers)
        assert (number(row[2]), number(row[3])) == pytest.approx(
            (4e-6 * number(row[1]), 2e-6 * number(row[1])), abs=0.06
        )
