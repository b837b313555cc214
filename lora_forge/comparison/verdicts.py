"""What a comparison came to, in plain sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lora_forge.comparison.statistics import LEVEL, Interval, Outcome, Paired
from lora_forge.comparison.summary import OWN, Summary
from lora_forge.errors import printable

LABELS = {
    "conditioning_shift": "conditioning shift",
    "specificity": "prompt specificity",
    "delta_norm": "‖ΔW‖",
    "effective_rank": "effective rank",
    OWN: "own objective",
}
CONDITIONING = ("conditioning_shift", "specificity")
_OUTCOMES: dict[Outcome, str] = {
    "higher": "higher with {}",
    "lower": "lower with {}",
    "within noise": "within noise: {}",
    "tests disagree": "only one of the two tests finds a difference: {}",
    "too few prompts": "too few prompts to tell: {}",
    "no values": "no values to compare: {}",
}
_UNTOLD: dict[Outcome, str] = {  # of what cannot be told from a random LoRA
    "tests disagree": "told from a random LoRA of equal norm by only one of the two tests",
    "too few prompts": "too few prompts to tell from a random LoRA of equal norm",
    "no values": "nothing to tell from a random LoRA of equal norm by",
    "within noise": "cannot be told from a random LoRA of equal norm, by conditioning shift or prompt specificity",
}


def verdicts(summary: Summary) -> list[str]:
    """What differs beyond noise, what does not, and what is no better than a random LoRA; the most important first."""
    return [*_failed(summary), *_against_random(summary), *_against_first(summary), *_few_prompts(summary)]


def label_of(measure: str) -> str:
    """A measure in words; `cross.NAME` is what became of the objective NAME."""
    return LABELS.get(measure) or f"change of {printable(measure.removeprefix('cross.'))}"


def _failed(summary: Summary) -> Iterator[str]:
    for one in summary.objectives:
        if one.failed:
            total = one.runs + one.failed
            yield f"{printable(one.name)}: {one.failed} of {total} runs failed, and are in none of the numbers."


def _against_random(summary: Summary) -> Iterator[str]:
    """Objectives that cannot be told from random LoRAs, then the others by what tells them apart."""
    judged = [one for one in summary.objectives if one.against_random["conditioning_shift"].difference]
    moving = [one for one in judged if one.moves_conditioning]
    alike: dict[str, list[str]] = {}
    for one in moving:
        if not one.told_from_random:
            outcomes = {one.against_random[key].outcome for key in CONDITIONING}
            words = next(words for outcome, words in _UNTOLD.items() if outcome in outcomes)
            alike.setdefault(words, []).append(printable(one.name))
    for words, names in alike.items():
        yield f"{', '.join(names)}: {words}."
    groups: dict[str, list[str]] = {}
    for one in moving:
        if one.told_from_random:
            words = " and ".join(f"{LABELS[key]} {one.against_random[key].outcome}" for key in CONDITIONING)
            groups.setdefault(words, []).append(printable(one.name))
    for words, names in groups.items():
        yield f"Against a random LoRA of equal norm, {words}: {', '.join(names)}."
    for one in judged:
        if one not in moving:
            told = f"its own objective against that one's: {worded(one.against_random[OWN])}"
            yield f"{printable(one.name)}: moves nothing of the conditioning, nor does a random LoRA; {told}."


def worded(paired: Paired) -> str:
    """`higher (+12 %)`, of what it is compared with; `within noise`."""
    return paired.outcome + (f" ({_percent(paired)})" if paired.differs else "")


def _percent(paired: Paired) -> str:
    return "from 0" if paired.relative is None else f"{float(f'{100 * paired.relative:.2g}'):+g} %"


def interval_text(interval: Interval | None, *, signed: bool = False, scale: float = 1.0) -> str:
    """`0.120 ± 0.011`: a mean, and half of its interval to two digits; a dash for none."""
    if interval is None:
        return "–"
    mean, sign = scale * interval.mean, "+" if signed else ""
    half = 0.0 if interval.high is None else scale * (interval.high - interval.mean)
    if half == 0:
        return f"{mean:{sign}.4g}"
    decimals = max(0, 1 - math.floor(math.log10(half)))
    return f"{mean:{sign}.4g} ± {half:.2g}" if decimals > 6 else f"{mean:{sign}.{decimals}f} ± {half:.{decimals}f}"


def _against_first(summary: Summary) -> Iterator[str]:
    """A sentence per measure, on all objectives but the first."""
    if len(summary.objectives) < 2:
        return
    first, *others = summary.objectives
    for measure in CONDITIONING:
        parts = []
        for outcome, words in _OUTCOMES.items():
            names = [
                printable(one.name) + (f" ({_percent(paired)})" if paired.differs else "")
                for one in others
                if (paired := one.against_first[measure]).outcome == outcome
            ]
            if names:
                parts.append(words.format(", ".join(names)))
        yield f"{LABELS[measure].capitalize()}, against {printable(first.name)}: {'; '.join(parts)}."


def _few_prompts(summary: Summary) -> Iterator[str]:
    """Where Wilcoxon's test could not find a difference however large."""
    tests = [
        paired
        for one in summary.objectives
        for measure in CONDITIONING
        for paired in (one.against_first.get(measure), one.against_random[measure])
        if paired
    ]
    weak = [(one.difference.prompts, one.least) for one in tests if one.difference and one.least and one.least >= LEVEL]
    if weak:
        # Of n prompts the least p is 2 ** (1 - n) times the number of tests.
        enough = max(prompts + math.floor(math.log2(least / LEVEL)) + 1 for prompts, least in weak)
        told = f"are too few for Wilcoxon's test to find any difference; it takes {enough}"
        yield f"{max(prompts for prompts, _ in weak)} prompts {told}. More seeds do not help."
