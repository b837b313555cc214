"""An examination: which rules were checked, and what was found, in words."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from traceback import walk_tb

from lora_forge.errors import LoraForgeError
from lora_forge.records import Spec
from lora_forge.testing.rules import RULES

# A plugin's error is shown with the place in the plugin where it came from: none of these.
_NOT_THE_PLUGIN = {"lora_forge", "torch", "transformers", "diffusers", "peft", "safetensors", "contextlib", "importlib"}


@dataclass(frozen=True)
class Finding:
    """A rule that is broken, and how: what was seen, what was expected, what to do."""

    rule: str
    message: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.message}"


@dataclass(frozen=True)
class Examination:
    """What came of examining one plugin.

    checked: the rules that were checked, broken or kept. Those of `lora_forge.testing.RULES` that are missing could
    not be, since a finding came first, or do not concern this plugin.
    """

    kind: str
    name: str
    checked: tuple[str, ...]
    findings: tuple[Finding, ...]

    def require(self) -> None:
        """Raises NotConforming if anything was found."""
        if self.findings:
            raise NotConforming(self)


class NotConforming(LoraForgeError, AssertionError):
    """A plugin breaks its contract; the message has every finding. Exit code 1, and a failed assertion in a test."""

    def __init__(self, examination: Examination) -> None:
        self.examination = examination
        self.findings = examination.findings
        count = len(self.findings)
        rules = "a rule" if count == 1 else f"{count} rules"
        lines = "".join(f"\n  {finding}" for finding in self.findings)
        super().__init__(f"{examination.kind} {examination.name!r} breaks {rules} of its contract:{lines}")


class Broken(Exception):
    """Raised within a rule's check: the rule is broken, in words."""


class Halt(Exception):
    """Ends an examination: what comes next makes no sense without what was found broken."""


@dataclass
class Book:
    """Takes down what an examination checks and finds.

    beside: specs of other plugins of the kind that are there too. raised: rules whose check an error of the plugin cut
    short, so that they were not checked.
    """

    kind: str
    beside: tuple[Spec, ...] = ()
    checked: dict[str, None] = field(default_factory=dict)
    raised: set[str] = field(default_factory=set)
    findings: list[Finding] = field(default_factory=list)

    @contextmanager
    def rule(self, name: str, *, vital: bool = False) -> Iterator[None]:
        """Within this a rule is checked. What the plugin raises is a finding, never an error of the kit.

        vital: a finding here ends the examination (Halt).
        """
        assert name in RULES[self.kind], name
        before = len(self.findings)
        try:
            yield
        except Halt:
            raise
        except Broken as broken:
            self.findings.append(Finding(name, str(broken)))
        except (Exception, SystemExit) as error:
            when = "" if name == "runs" else f", when this was checked: {RULES[self.kind][name]}"
            self.findings.append(Finding("runs", f"it raised {in_words(error)}{when}"))
            self.raised.add(name)
        self.checked[name] = None
        if vital and len(self.findings) > before:
            raise Halt

    def examination(self, name: str) -> Examination:
        broken = {one.rule for one in self.findings}
        self.checked = {name: None for name in self.checked if name in broken or name not in self.raised}
        self.checked["runs"] = None
        order = list(RULES[self.kind])
        checked = tuple(sorted(self.checked, key=order.index))
        findings = tuple(sorted(self.findings, key=lambda one: order.index(one.rule)))
        return Examination(self.kind, name, checked, findings)


def in_words(error: BaseException) -> str:
    """An error's type and message in one line, and the line of the plugin that it came from."""
    place = ""
    for frame, line in walk_tb(error.__traceback__):
        if str(frame.f_globals.get("__name__", "")).split(".")[0] not in _NOT_THE_PLUGIN:
            place = f" ({Path(frame.f_code.co_filename).name}, line {line})"
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ") + place


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """Within this the global generators of torch, numpy and Python start from `seed`; afterwards they are as before."""
    import torch

    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random.seed(seed)
            if numpy:
                numpy.random.seed(seed)
            yield
    finally:
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)
