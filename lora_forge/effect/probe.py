"""What a LoRA does beside what it was trained for: to other prompts, to other losses, and next to a random one."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch

from lora_forge.bank import Bank, Pair
from lora_forge.batch import OWN_PROMPT, ModelView, Texts
from lora_forge.contracts import LayerKey
from lora_forge.effect.measure import Shift, conditioning_shifts
from lora_forge.files.deltas import norm_and_rank
from lora_forge.seeds import generator_for

Result = TypeVar("Result")
LossValues = Mapping[str, float | None]  # a loss's label to its value, None of one that raised


@dataclass(frozen=True)
class Specificity:
    """Conditioning shifts of the training prompt, and the mean of others'; None where there are no such prompts.

    controls: of those that are not the training prompt itself. empty: of the empty text. ratio: own / controls, None
    where controls are 0 or missing.
    """

    own: float | None
    paraphrases: float | None
    controls: float | None
    empty: float | None
    ratio: float | None


@dataclass(frozen=True)
class Movement:
    """How far weights move the training prompt's conditioning, all of it and by part, and that of other prompts.

    None where no text encoder is in use.
    """

    conditioning_shift: float | None
    shifts: Mapping[str, float]
    specificity: Specificity


@dataclass(frozen=True)
class Probe:
    """One prompt's LoRA.

    delta_norm, component_norms: ‖ΔW‖, Frobenius, of all layers and of each component's. effective_rank: the mean over
    reached layers whose ΔW is not zero, of exp of the entropy of ΔW's normalised singular values (Roy & Vetterli 2007);
    None without such a layer. random: what a LoRA of random A and B does whose ‖ΔW‖ is the same in every layer.
    measured_before, measured_after, measured_random: losses that were measured, by label.
    """

    conditioning_shift: float | None
    shifts: Mapping[str, float]
    specificity: Specificity
    delta_norm: float
    component_norms: Mapping[str, float]
    effective_rank: float | None
    random: Movement
    measured_after: LossValues
    measured_random: LossValues
    measured_before: LossValues = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_probe(
    bank: Bank,
    view: ModelView,
    reached: Collection[LayerKey],
    paraphrases: Sequence[str],
    controls: Sequence[str],
    evaluate: Callable[[], Sequence[LossValues]],
) -> list[Probe]:
    """One `Probe` per prompt of a bank that is in the view's slot. The bank itself is not changed.

    paraphrases: texts in which `{prompt}` stands for each prompt's own text. evaluate: per prompt, the measured losses
    under the weights that are in the slot. All models run unmasked, as the pipeline does.
    """
    norms = bank.delta_norms()
    random = random_bank(bank, norms, names_of(view))
    movements = _movements(view, (bank, random), paraphrases, controls)
    after, by_chance = (_under(view, each, evaluate) for each in (bank, random))
    components = dict.fromkeys(component for component, _ in norms)
    return [
        Probe(
            **vars(own),
            delta_norm=_norm(norms.values(), prompt),
            component_norms={
                one: _norm((norm for key, norm in norms.items() if key[0] == one), prompt) for one in components
            },
            effective_rank=_effective_rank(bank, reached, prompt),
            random=chance,
            measured_after=dict(after[prompt]),
            measured_random=dict(by_chance[prompt]),
        )
        for prompt, (own, chance) in enumerate(zip(*movements, strict=True))
    ]


def names_of(view: ModelView) -> list[str]:
    """What each prompt's random LoRA is drawn by: its seed and its texts, so that no two prompts share one."""
    return [f"{seed}/{'/'.join(_row(view.texts, prompt))}" for prompt, seed in enumerate(view.seeds)]


def random_bank(bank: Bank, norms: Mapping[LayerKey, torch.Tensor], names: Sequence[str]) -> Bank:
    """A bank nobody trains, of normal A and B, whose ‖ΔW‖ are `norms`, `(prompts,)` of each layer.

    names: what each prompt's numbers are drawn by; a layer's depend on it and on the layer alone.
    """
    result = Bank((), rank=bank.rank, alpha=bank.alpha, prompts=bank.prompts, device=str(bank.parameter.device))
    result.layers = bank.layers
    for key, pair in bank.pairs.items():
        result.pairs[key] = _random_pair(pair, key, norms[key] / bank.scale, names)
    return result


def _random_pair(pair: Pair, key: LayerKey, norms: torch.Tensor, names: Sequence[str]) -> Pair:
    """A and B of one layer. norms: of B A, `(prompts,)`."""
    if not bool(norms.any()):  # views of a single number
        return Pair(*(matrix.new_zeros(()).expand(matrix.shape) for matrix in pair))
    rows = []
    for name, norm in zip(names, norms, strict=True):
        generator = generator_for(f"{name}/random/{key[0]}/{key[1]}")
        a, b = (torch.randn(matrix.shape[1:], generator=generator).double() for matrix in pair)
        size = ((a @ a.T) * (b.T @ b)).sum().sqrt()
        rows.append((a.float(), (b * (norm / size)).float()))
    return Pair(*(torch.stack(matrices).to(pair.lora_A.device) for matrices in zip(*rows, strict=True)))


def _movements(
    view: ModelView, banks: Sequence[Bank], paraphrases: Sequence[str], controls: Sequence[str]
) -> list[list[Movement]]:
    """Of each bank, of each prompt."""
    own = _shifts(view, view.texts, banks)
    others = [_mean_shifts(view, texts, banks) for texts in (paraphrases, controls, ("",))]
    return [
        [_movement(shifts, *means) for shifts, *means in zip(rows, *(means[bank] for means in others), strict=True)]
        for bank, rows in enumerate(own)
    ]


def _movement(
    shifts: Sequence[Shift], paraphrases: float | None, controls: float | None, empty: float | None
) -> Movement:
    own = shifts[0].relative if shifts else None
    ratio = own / controls if own is not None and controls else None
    parts = {shift.name: shift.relative for shift in shifts[1:]}
    return Movement(own, parts, Specificity(own, paraphrases, controls, empty, ratio))


def _mean_shifts(view: ModelView, texts: Sequence[str], banks: Sequence[Bank]) -> list[list[float | None]]:
    """Of each bank, of each prompt: the mean shift over those of the texts that are not the prompt's own."""
    sums = torch.zeros(len(banks), view.prompts, dtype=torch.float64)
    counts = torch.zeros(view.prompts)
    for text in texts if view.encoders else ():
        rows = tuple((encoder, tuple(text.replace(OWN_PROMPT, one) for one in own)) for encoder, own in view.texts)
        others = torch.tensor([_row(rows, prompt) != _row(view.texts, prompt) for prompt in range(view.prompts)])
        shifts = _shifts(view, rows, banks)
        sums += others * torch.tensor([[own[0].relative for own in each] for each in shifts], dtype=torch.float64)
        counts += others
    means = (sums / counts).tolist()
    return [[mean if count else None for mean, count in zip(row, counts, strict=True)] for row in means]


def _row(texts: Texts, prompt: int) -> list[str]:
    return [rows[prompt] for _, rows in texts]


def _shifts(view: ModelView, texts: Texts, banks: Sequence[Bank]) -> list[list[list[Shift]]]:
    """`conditioning_shifts` of these texts under each bank; nothing is remembered of them."""
    other = ModelView(view.backend, view.slot, dict(texts), view.seeds, view.device)
    return [_under(other, bank, lambda: conditioning_shifts(other)) for bank in banks]


def _under(view: ModelView, bank: Bank, function: Callable[[], Result]) -> Result:
    """What a function that looks through the view returns with this bank in the slot."""
    before, view.slot.bank = view.slot.bank, bank
    view.begin_evaluation()
    try:
        return function()
    finally:
        view.slot.bank = before
        view.begin_evaluation()


def _norm(norms: Iterable[torch.Tensor], prompt: int) -> float:
    """Of all these layers' ΔW together."""
    return math.hypot(*(float(norm[prompt]) for norm in norms))


def _effective_rank(bank: Bank, reached: Collection[LayerKey], prompt: int) -> float | None:
    ranks = []
    for key in reached:
        down, up = (matrix.detach()[prompt].cpu().numpy() for matrix in bank.pairs[key])
        norm, rank = norm_and_rank("lora", {"down": down, "up": up}, bank.scale)
        if norm and rank is not None:
            ranks.append(rank)
    return math.fsum(ranks) / len(ranks) if ranks else None
