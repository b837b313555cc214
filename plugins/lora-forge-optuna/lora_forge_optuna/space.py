"""What is searched: keys of settings, each with the values it may take."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_forge.errors import UsageError, nearest
from lora_forge_optuna.keys import CHOSEN, Key, read_pair, read_value
from lora_forge_optuna.settings import OF_THE_MODEL, OF_THE_SWEEP, Settings

if TYPE_CHECKING:
    import optuna

Params = Mapping[str, Any]  # by key as text, as Optuna keeps them

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})((?:\s+(?:log|step\s+{_NUMBER}))*)\Z")
_WHOLE = re.compile(r"[+-]?\d+\Z")


@dataclass(frozen=True)
class Choices:
    """Values as typed."""

    texts: tuple[str, ...]

    def suggest(self, trial: optuna.Trial, name: str) -> Any:
        return trial.suggest_categorical(name, self.texts)

    def value(self, param: Any) -> Any:
        return read_value(param)

    @property
    def values(self) -> Sequence[str]:
        return self.texts

    ends = values

    def __str__(self) -> str:
        return " | ".join(self.texts)


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included: whole ones where all that was typed is whole."""

    low: float
    high: float
    step: float | None
    log: bool

    def suggest(self, trial: optuna.Trial, name: str) -> Any:
        if isinstance(self.low, int):
            return trial.suggest_int(name, self.low, int(self.high), step=int(self.step or 1), log=self.log)
        return trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)

    def value(self, param: Any) -> Any:
        return param

    @property
    def values(self) -> Sequence[float] | None:
        """All of them; None where they are a continuum."""
        step = 1 if isinstance(self.low, int) else self.step
        if step is None:
            return None
        count = int((self.high - self.low) / step + 1e-9) + 1
        return [self.low + index * step for index in range(count)]

    @property
    def ends(self) -> Sequence[float]:
        return (self.low, self.high)

    def __str__(self) -> str:
        how = (" log" if self.log else "") + (f" step {self.step}" if self.step else "")
        return f"{self.low} … {self.high}{how}"


@dataclass(frozen=True)
class Parameter:
    key: Key
    domain: Choices | Range

    @property
    def name(self) -> str:
        return str(self.key)


@dataclass(frozen=True)
class Space:
    """Parameters, names of plugins first; an option of a plugin is searched in those trials that use the plugin.

    fixed: settings that are the same in all trials, over the run config's.
    """

    parameters: tuple[Parameter, ...]
    config: Settings
    fixed: tuple[tuple[Key, Any], ...]

    def settings(self, params: Params) -> Settings:
        """What a trial with these values asks for."""
        searched = [(Key.read(name), value) for name, value in self.typed(params).items()]
        return self.config.having([*self.fixed, *searched])

    def typed(self, params: Params) -> dict[str, Any]:
        """Values as runs are given them."""
        domains = {one.name: one.domain for one in self.parameters}
        return {name: domains[name].value(param) for name, param in params.items()}

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """The values of a trial, from Optuna."""
        params: dict[str, Any] = {}
        for one in self.parameters:
            if self._in_play(one, params):
                params[one.name] = one.domain.suggest(trial, one.name)
        return params

    def size(self) -> int:
        """How many points there are. Raises UsageError where there is no end of them."""
        endless = [one.name for one in self.parameters if one.domain.values is None]
        if endless:
            raise UsageError(f"{', '.join(endless)}: a grid takes a step, as in 0.1..2 step 0.1, or A|B|C")
        return sum(1 for _ in self._points({}, self.parameters, ends=False))

    def corners(self) -> list[Params]:
        """Points in which each choice and each end of a range that can occur does occur."""
        names = [one for one in self.parameters if not (one.key.owner or one.key.option) and one.key.kind in CHOSEN]
        others = self.parameters[len(names) :]
        points: list[Params] = []
        for chosen in self._points({}, names, ends=True):
            own = [one for one in others if self._in_play(one, chosen)]
            for index in range(max((len(one.domain.ends) for one in own), default=1)):
                picked = {one.name: one.domain.ends[index % len(one.domain.ends)] for one in own}
                points.append({**chosen, **picked})
        return points

    def check(self) -> None:
        """Raises UsageError for an owner that no trial can choose, with the nearest that one can."""
        for key in [one.key for one in self.parameters] + [key for key, _ in self.fixed]:
            if not key.owner:
                continue
            kind = "loss" if key.kind == "weight" else key.kind
            names = self._possible(kind)
            if key.owner not in names:
                raise UsageError(f"{key}: the sweep uses no {kind} {key.owner!r}{nearest(key.owner, names)}")

    def as_text(self) -> dict[str, str]:
        return {one.name: str(one.domain) for one in self.parameters}

    def _in_play(self, parameter: Parameter, params: Params) -> bool:
        key = parameter.key
        return not key.owner or bool(self.settings(params).chosen(key))

    def _points(self, params: Params, rest: Sequence[Parameter], *, ends: bool) -> Iterator[Params]:
        if not rest:
            yield params
        elif not self._in_play(rest[0], params):
            yield from self._points(params, rest[1:], ends=ends)
        else:
            for value in (rest[0].domain.ends if ends else rest[0].domain.values) or ():
                yield from self._points({**params, rest[0].name: value}, rest[1:], ends=ends)

    def _possible(self, kind: str) -> set[str]:
        searched = [one for one in self.parameters if one.key == Key(kind)]
        values = [one.domain.value(text) for one in searched for text in one.domain.ends]
        base = self.config.having(self.fixed)
        options = [base.having([(Key(kind), value)]) for value in values] or [base]
        return {plugin.name for settings in options for plugin in settings.plugins.get(kind, ()) if plugin.name}


def read_space(searches: Sequence[str], config: Settings, fixed: Sequence[tuple[Key, Any]]) -> Space:
    """From `KEY=SPACE` texts. Raises UsageError."""
    pairs = [read_pair(one, "--search") for one in searches]
    parameters = [Parameter(key, _domain(text, str(key))) for key, text in pairs]
    names = [one.name for one in parameters]
    for parameter in parameters:
        key = parameter.key
        if key.kind in (*OF_THE_SWEEP, *OF_THE_MODEL, "measure"):
            raise UsageError(f"{key}: it is the same in all trials, and cannot be searched")
        if names.count(parameter.name) > 1:
            raise UsageError(f"{key}: is searched twice")
        if any(key == one for one, _ in fixed):
            raise UsageError(f"{key}: is both set and searched")
    parameters.sort(key=lambda one: not (one.key.kind in CHOSEN and not one.key.option))
    space = Space(tuple(parameters), config, tuple(fixed))
    space.check()
    return space


def _domain(text: str, name: str) -> Choices | Range:
    match = _RANGE.match(text)
    if not match:
        texts = tuple(one.strip() for one in text.split("|"))
        if len(texts) < 2 or not all(texts):
            raise UsageError(f"{name}: expected LOW..HIGH, LOW..HIGH log, LOW..HIGH step STEP or A|B|C, got {text!r}")
        if len(set(texts)) < len(texts):
            raise UsageError(f"{name}: a value is there twice in {text!r}")
        return Choices(texts)
    low, high, how = match.groups()
    log, steps = "log" in how.split(), re.findall(_NUMBER, how)
    numbers = [low, high, *steps]
    kind = int if all(_WHOLE.match(one) for one in numbers) else float
    made = Range(kind(low), kind(high), kind(steps[-1]) if steps else None, log)
    if not made.low < made.high:
        raise UsageError(f"{name}: {low} is not below {high}")
    if log and (steps or made.low <= 0):
        raise UsageError(f"{name}: with log the low end is above zero, and there is no step")
    if made.step is not None and not made.step > 0:
        raise UsageError(f"{name}: the step is not above zero")
    return made
