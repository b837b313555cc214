"""The conformance kit: what holds for plugins of every kind, their options first; and how findings are told."""

from __future__ import annotations

import enum
import random
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from rule_breakers import backends, executors, initializers, losses, optimizers, savers

from lora_forge import LossSpec
from lora_forge.errors import LoraForgeError, UsageError
from lora_forge.records import Spec
from lora_forge.testing import (
    Finding,
    NotConforming,
    check_backend,
    check_executor,
    check_initializer,
    check_loss,
    check_optimizer,
    check_saver,
    examine,
)

GOOD: dict[str, Spec] = {
    "loss": losses.spec(losses.good),
    "initializer": initializers.spec(initializers.good),
    "optimizer": optimizers.spec(optimizers.Descent, elementwise=True),
    "saver": savers.spec("lora_forge.builtin.savers:universal"),
    "backend": backends.GOOD,
    "executor": executors.spec(executors.good),
}
CHECKS: dict[str, Any] = {
    "loss": check_loss,
    "initializer": check_initializer,
    "optimizer": check_optimizer,
    "saver": check_saver,
    "backend": check_backend,
    "executor": check_executor,
}


class Colour(enum.Enum):
    RED = "red"


@dataclass(frozen=True)
class Everything:
    """An option of each type there is."""

    switch: bool = True
    count: int = field(default=3, metadata={"min": 3})
    size: float = field(default=0.5, metadata={"above": 0, "max": 0.5})
    name: str = "two words, and a comma"
    empty: str = ""
    path: Path = Path("some where")
    choice: Literal["a", 2] = 2
    colour: Colour = Colour.RED
    maybe: float | None = None
    several: list[int] = field(default_factory=lambda: [1, 2])
    none_of_them: list[str] = field(default_factory=list)
    pair: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True)
class Impossible:
    size: float = field(default=0.0, metadata={"above": 0})


@dataclass(frozen=True)
class Table:
    table: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Endless:
    limit: float = float("inf")


@dataclass(frozen=True)
class Doubles:
    size: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", 2 * self.size)


@dataclass(frozen=True, eq=False)
class ByIdentity:
    size: float = 1.0


@dataclass(frozen=True)
class Refuses:
    size: float = 1.0

    def __post_init__(self) -> None:
        raise ValueError("never")


@dataclass(frozen=True)
class Required:
    text: str


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize(
    ("change", "rule", "words"),
    [
        ({"name": "Capital"}, "record", ["'Capital'", "lower-case"]),
        ({"options": dict}, "record", ["dataclass"]),
        ({"factory": 7}, "record", ["factory", "neither a dotted string nor a callable"]),
        ({"factory": "no colon"}, "record", ["package.module:Name"]),
        ({"options": Impossible}, "bounds", ["'size'", "must be > 0, got 0"]),
        ({"options": Table}, "record", ["table", "cannot be read", "dict[str, int]"]),
        ({"options": Endless}, "options", ["refused", "limit", "finite"]),
        ({"options": Doubles}, "options", ["not the same", "size was 2.0, is 4.0"]),
        ({"options": ByIdentity}, "options", ["identity", "eq"]),
        ({"options": Refuses}, "runs", ["ValueError: never"]),
        ({"factory": "not_there:Thing"}, "builds", ["No module named 'not_there'"]),
        ({"factory": "json:decoder"}, "builds", ["module"]),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_a_bad_record_bad_options_or_a_bad_factory_of_any_kind_is_the_one_finding(
    kind: str, change: dict[str, Any], rule: str, words: list[str]
) -> None:
    examination = examine(replace(GOOD[kind], **change))
    assert [finding.rule for finding in examination.findings] == [rule], examination.findings
    message = examination.findings[0].message
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("kind", GOOD)
def test_options_of_every_type_come_back(kind: str) -> None:
    assert examine(replace(GOOD[kind], options=Everything)).findings == ()


def test_a_suffix_that_is_no_ending_is_a_finding() -> None:
    (finding,) = examine(savers.spec(savers.pickled, suffix="pt")).findings
    assert finding.rule == "record"
    assert "'pt'" in finding.message
    assert "dot" in finding.message


@pytest.mark.parametrize("kind", GOOD)
def test_a_check_returns_nothing_for_a_plugin_that_keeps_its_contract(kind: str) -> None:
    assert CHECKS[kind](GOOD[kind]) is None


@pytest.mark.parametrize("kind", GOOD)
def test_a_check_raises_every_finding_as_a_failed_assertion(kind: str) -> None:
    with pytest.raises(NotConforming) as caught:
        CHECKS[kind](replace(GOOD[kind], options=Impossible))
    error = caught.value
    assert isinstance(error, AssertionError)
    assert isinstance(error, LoraForgeError)
    assert error.exit_code == 1
    (finding,) = error.findings
    assert str(error) == f"{kind} 'breaker' breaks a rule of its contract:\n  bounds: {finding.message}"


def test_several_findings_are_told_together_in_the_order_of_the_rules() -> None:
    def denoiser_alone(batch: Any) -> torch.Tensor:
        noise: torch.Tensor = batch._view.backend.predict_noise(
            torch.ones(batch.prompts, 4, 8, 8), torch.full((batch.prompts,), 500), batch.frozen()
        )
        return noise.square().flatten(1).mean(dim=1)

    with pytest.raises(NotConforming) as caught:
        check_loss(losses.spec(denoiser_alone))
    assert [finding.rule for finding in caught.value.findings] == ["reaches", "undeclared"]
    lines = str(caught.value).splitlines()
    assert lines[0] == "loss 'breaker' breaks 2 rules of its contract:"
    assert [line.split(":")[0] for line in lines[1:]] == ["  reaches", "  undeclared"]


@pytest.mark.parametrize("kind", GOOD)
def test_a_spec_of_another_kind_is_a_mistake_in_the_call(kind: str) -> None:
    other = GOOD["saver" if kind != "saver" else "loss"]
    with pytest.raises(UsageError, match=f"check_{kind} takes a .*Spec, got {type(other).__name__}"):
        CHECKS[kind](other)
    with pytest.raises(UsageError, match="dict is no spec"):
        examine({})  # type: ignore[arg-type]


def test_options_without_defaults_have_to_be_given() -> None:
    def far(batch: Any, options: Required) -> torch.Tensor:
        there = batch.encode(options.text, adapted=False)
        total: torch.Tensor = torch.zeros(batch.prompts)
        for encoder, output in batch.adapted().items():
            total = total + (output.pooled - there[encoder].pooled).square().mean(dim=1)
        return total

    spec = LossSpec(name="far", summary="s", factory=far, options=Required)
    with pytest.raises(UsageError, match=r"loss 'far' .* required options \(text\).*options=Required\(text=…\)"):
        check_loss(spec)
    check_loss(spec, Required(text="a castle"))
    with pytest.raises(UsageError, match="takes options of type Required, got Everything"):
        check_loss(spec, Everything())


def test_what_is_examined_is_the_plugin_with_the_options_given() -> None:
    @dataclass(frozen=True)
    class Size:
        size: float = 1.0

    def root(batch: Any, options: Size) -> torch.Tensor:
        return losses.good(batch) + (losses.good(batch) * 0 + options.size).sqrt()

    spec = LossSpec(name="root", summary="s", factory=root, options=Size)
    assert examine(spec).findings == ()
    (finding,) = examine(spec, Size(size=-1.0)).findings
    assert finding.rule == "finite"


def test_an_examination_leaves_the_global_generators_as_they_were() -> None:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    expected = torch.rand(3).tolist(), random.random(), np.random.rand()
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    for spec in GOOD.values():
        assert examine(spec).findings == ()
    assert (torch.rand(3).tolist(), random.random(), np.random.rand()) == expected


def test_an_examination_says_what_it_could_not_check() -> None:
    examination = examine(losses.spec(losses.one_for_all))
    assert examination.findings[0].rule == "shape"
    assert "shape" in examination.checked
    assert "independent" not in examination.checked
    assert str(examination.findings[0]).startswith("shape: for 3 prompts it returns shape ()")
    assert isinstance(examination.findings[0], Finding)


def test_naming_the_kit_imports_nothing_heavy() -> None:
    code = (
        "import sys, lora_forge.testing, lora_forge.testing.pytest_plugin\n"
        "from lora_forge.testing import check_loss, NotConforming\n"
        "print([name for name in ('torch', 'transformers', 'diffusers', 'peft') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
