"""`lora_forge.compare`, as a notebook would call it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import lora_forge
from lora_forge.errors import ConfigError, UsageError

OBJECTIVES = ("embedding_magnitude", "conditioning_magnitude + 0.5*pooled_align")


def test_it_gives_the_results_that_are_in_the_folder_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    settings = {"output_dir": tmp_path, "model": "tiny_sdxl", "iterations": 2, "controls": ["two red chairs"]}
    first = lora_forge.compare(["a steampunk owl"], OBJECTIVES, seeds=1, **settings)  # type: ignore[arg-type]
    assert [(row.objective, row.seed, row.error) for row in first.rows] == [(name, 0, None) for name in OBJECTIVES]
    assert lora_forge.read_results(tmp_path) == first
    more = lora_forge.compare(["a steampunk owl", "bond"], OBJECTIVES, seeds=[0, 7], **settings)  # type: ignore[arg-type]
    assert [(row.prompt, row.seed) for row in more.of(OBJECTIVES[0])] == [
        (prompt, seed) for prompt in ("a steampunk owl", "bond") for seed in (0, 7)
    ]
    assert more.rows[0].measured is not None
    assert first.rows[0].measured is not None
    assert replace(more.rows[0].measured, peak_memory=None) == replace(first.rows[0].measured, peak_memory=None)
    assert len(more.frame()) == 8


def test_its_mistakes_are_those_of_the_command(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'iterations'"):
        lora_forge.compare(["bond"], OBJECTIVES, output_dir=tmp_path, model="tiny_sdxl", iteratons=2)
    with pytest.raises(UsageError, match="no objective"):
        lora_forge.compare(["bond"], [], output_dir=tmp_path, model="tiny_sdxl")
