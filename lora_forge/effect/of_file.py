"""What a LoRA file does to what the denoiser is conditioned on: for prompts, layer by layer, and token by token.

Everything is measured as `lora_forge.effect.measure` does it: ‖with − without‖ / ‖without‖, unmasked, as the pipeline
encodes. Only the text encoders that the file has layers of are run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lora_forge.bank import Bank, BankSlot, Pair
from lora_forge.batch import ModelView, texts_by_encoder
from lora_forge.contracts import Backend, LayerKey, TargetLayer
from lora_forge.effect.measure import Shift, conditioning_shifts
from lora_forge.effect.tokens import TokenShift, conditioning_parts, encoder_groups, token_shifts
from lora_forge.errors import LoraFileError
from lora_forge.files.layer_tensors import LayerTensors

ROLES = ("training", "paraphrase", "control", "empty")
TOGETHER = "conditioning"  # the shift of all parts together
_ROWS = 16  # prompts, or layers, in one forward pass


@dataclass(frozen=True)
class Prompt:
    """A prompt to measure on. role: one of `ROLES`. text_2: another text for the second encoder and later."""

    role: str
    text: str
    text_2: str | None = None


@dataclass(frozen=True)
class PromptEffect:
    """How far the conditioning moves for a prompt: all parts together (`conditioning`), then each part."""

    role: str
    text: str
    text_2: str | None
    shifts: tuple[Shift, ...]


@dataclass(frozen=True)
class Specificity:
    """The prompt specificity: `ratio` = `training` / `controls`. 1 is a LoRA that moves every prompt alike.

    name: of the part, or `conditioning` for all together. training: the relative shift for the training prompt.
    controls: the arithmetic mean of the relative shifts for the control prompts, and for no others; None without any.
    ratio: None where it says nothing, and `reason` says why.
    """

    name: str
    training: float
    controls: float | None
    ratio: float | None
    reason: str


@dataclass(frozen=True)
class LayerEffect:
    """What a layer contributes for the training prompt.

    delta_norm: ‖ΔW‖. alone: the relative shift of all of the conditioning with this layer on and all others off.
    parts: the same of each part that its encoder makes. without: the shift with all layers but this one; None unless
    asked for.
    """

    component: str
    layer: str
    delta_norm: float
    alone: float
    parts: Mapping[str, float]
    without: float | None


@dataclass(frozen=True)
class FileEffect:
    """encoders: those that were run. layers, tokens: for the training prompt. notes: what to know about the numbers."""

    encoders: tuple[str, ...]
    prompts: tuple[PromptEffect, ...]
    specificity: tuple[Specificity, ...]
    layers: tuple[LayerEffect, ...]
    tokens: tuple[TokenShift, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


NOTHING_TO_MEASURE = FileEffect((), (), (), (), (), ())


def measure_file_effect(
    backend: Backend,
    layers: Mapping[LayerKey, LayerTensors],
    prompts: Sequence[Prompt],
    *,
    device: str,
    encoders: Sequence[str],
    rounding: float,
    per_layer: bool = True,
    leave_one_out: bool = False,
    each: Callable[[int], None] = lambda passes: None,
) -> FileEffect:
    """Load the encoders that the layers are in, put the layers in, measure, and let go of the model.

    layers: of text encoders, such as the model has them. prompts: the training prompt is the first. encoders: all that
    the backend has, in order. rounding: what the dtype resolves, relative; a smaller shift is noise. each: called
    before every pass with how many there are about.
    Raises LoraFileError where the conditioning becomes infinite or NaN, and whatever loading raises.
    """
    pairs = _pairs(layers, device)
    used = tuple(encoder for encoder in encoders if any(component == encoder for component, _ in pairs))
    slot = BankSlot()
    backend.check_files(used)
    backend.load(used)
    rank = max(one.rank for one in layers.values())
    targets = [
        TargetLayer(*key, out_features=one.up.shape[0], in_features=one.down.shape[1]) for key, one in layers.items()
    ]
    try:
        for encoder in used:
            backend.adapt([target for target in targets if target.component == encoder], rank, float(rank), slot)
        measuring = _Measuring(backend, slot, pairs, prompts[0], used, encoders[:1], device, each)
        measuring.passes = measuring.count(prompts, per_layer=per_layer, leave_one_out=leave_one_out)
        effects = measuring.prompts(prompts)
        full = {shift.name: shift.relative for shift in effects[0].shifts}
        return FileEffect(
            encoders=used,
            prompts=tuple(effects),
            specificity=tuple(_specificities(effects, rounding)),
            layers=tuple(measuring.layers(full, leave_one_out)) if per_layer else (),
            tokens=tuple(measuring.tokens()),
            notes=tuple(measuring.notes),
        )
    finally:
        slot.bank = None
        backend.release()


class _Measuring:
    """The model with the layers' places in it, and a bank of the moment for each pass. prompt: the training prompt."""

    def __init__(
        self,
        backend: Backend,
        slot: BankSlot,
        pairs: Mapping[LayerKey, Pair],
        prompt: Prompt,
        encoders: Sequence[str],
        first: Sequence[str],
        device: str,
        each: Callable[[int], None],
    ) -> None:
        self.backend, self.slot, self.pairs, self.device = backend, slot, pairs, device
        self.prompt, self.encoders, self.first, self.each = prompt, tuple(encoders), tuple(first), each
        self.passes = 0
        self.notes: list[str] = []
        self.whole = _bank(pairs, 1, device)  # one row: it is the same for any number of texts
        self.alone = self.view([prompt], self.encoders)

    def count(self, prompts: Sequence[Prompt], *, per_layer: bool, leave_one_out: bool) -> int:
        """About how many passes there will be."""
        chunks = sum(-(-sum(key[0] == encoder for key in self.pairs) // _ROWS) for encoder in self.encoders)
        return -(-len(prompts) // _ROWS) + per_layer * (1 + leave_one_out) * chunks + 1

    def view(self, prompts: Sequence[Prompt], encoders: Sequence[str]) -> ModelView:
        texts = texts_by_encoder(encoders, self.first, [(one.text, one.text_2) for one in prompts])
        return ModelView(self.backend, self.slot, texts, [0] * len(prompts), self.device)

    def prompts(self, prompts: Sequence[Prompt]) -> list[PromptEffect]:
        self.slot.bank = self.whole
        effects = []
        for chunk in _chunks(prompts):
            self.each(self.passes)
            view = self.view(chunk, self.encoders)
            self.notes += _cut(view, chunk)
            for prompt, shifts in zip(chunk, conditioning_shifts(view), strict=True):
                if not all(math.isfinite(shift.relative) for shift in shifts):
                    raise LoraFileError(
                        f"with this LoRA, what the denoiser is conditioned on is not finite for {prompt.text!r}"
                    )
                effects.append(PromptEffect(prompt.role, prompt.text, prompt.text_2, tuple(shifts)))
        return effects

    def layers(self, full: Mapping[str, float], leave_one_out: bool) -> Iterator[LayerEffect]:
        """Many layers in one pass, each a row of the bank. full: the shifts with all layers on."""
        norms = self.whole.delta_norms()
        weights = self.weights()
        for encoders in encoder_groups(self.alone):
            keys = [key for key in self.pairs if key[0] in encoders]
            # All passes have as many rows, so that the frozen model runs once.
            rows = min(_ROWS, len(keys))
            view = self.view([self.prompt] * rows, encoders)
            for chunk in _chunks(keys):
                alone = self.rows(view, _alone(self.pairs, chunk, rows), rows)
                others = self.rows(view, _without(self.pairs, chunk, rows), rows) if leave_one_out else None
                for row, key in enumerate(chunk):
                    yield LayerEffect(
                        component=key[0],
                        layer=key[1],
                        delta_norm=float(norms[key][0]),
                        alone=_together(alone[row], weights),
                        parts=alone[row],
                        without=_together({**full, **others[row]}, weights) if others else None,
                    )

    def rows(self, view: ModelView, pairs: Mapping[LayerKey, Pair], rows: int) -> list[dict[str, float]]:
        """Each row's relative shifts by part, with these pairs in the bank."""
        self.each(self.passes)
        self.slot.bank = _bank(pairs, rows, self.device)
        view.begin_step()
        return [{shift.name: shift.relative for shift in row[1:]} for row in conditioning_shifts(view)]

    def weights(self) -> dict[str, float]:
        """Each part's norm in the frozen model, as a share of that of all parts together."""
        parts = conditioning_parts(self.alone, self.encoders, adapted=False)
        norms = {name: float(part.norm()) for name, part in parts.items()}
        whole = math.hypot(*norms.values())
        return {name: norm / whole if whole else 0.0 for name, norm in norms.items()}

    def tokens(self) -> list[TokenShift]:
        self.each(self.passes)
        self.slot.bank = self.whole
        return token_shifts(self.alone)[0]


def _pairs(layers: Mapping[LayerKey, LayerTensors], device: str) -> dict[LayerKey, Pair]:
    """A `(1, rank, in)` and B `(1, out, rank)` float32, alpha / rank gone into B; ranks may differ."""
    pairs = {}
    for key, one in layers.items():
        up = (one.up.double() * one.scale).float()
        if not bool(up.isfinite().all()) or not bool(one.down.float().isfinite().all()):
            raise LoraFileError(f"{'.'.join(key)}: its numbers times alpha / rank are beyond float32")
        pairs[key] = Pair(one.down.float()[None].to(device), up[None].to(device))
    return pairs


def _bank(pairs: Mapping[LayerKey, Pair], rows: int, device: str) -> Bank:
    """A bank of pairs that nobody trains: no buffer of its own, and any rank."""
    bank = Bank((), rank=1, alpha=1.0, prompts=rows, device=device)
    bank.pairs.update(pairs)
    return bank


def _alone(pairs: Mapping[LayerKey, Pair], keys: Sequence[LayerKey], rows: int) -> dict[LayerKey, Pair]:
    """Row by row one of `keys`, and nothing else; rows beyond them have nothing."""
    result = {}
    for key, (down, up) in pairs.items():
        if key in keys:
            chosen = up.new_zeros((rows, *up.shape[1:]))
            chosen[keys.index(key)] = up[0]
            result[key] = Pair(down.expand(rows, -1, -1), chosen)
        else:  # of rank 1, and views of a single number
            nothing = up.new_zeros((1, 1, 1))
            result[key] = Pair(nothing.expand(rows, 1, down.shape[2]), nothing.expand(rows, up.shape[1], 1))
    return result


def _without(pairs: Mapping[LayerKey, Pair], keys: Sequence[LayerKey], rows: int) -> dict[LayerKey, Pair]:
    """Row by row all but one of `keys`; rows beyond them have all."""
    result = {}
    for key, (down, up) in pairs.items():
        rest = up.expand(rows, -1, -1)
        if key in keys:
            rest = rest.clone()
            rest[keys.index(key)] = 0
        result[key] = Pair(down.expand(rows, -1, -1), rest)
    return result


def _together(parts: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The relative shift of all parts together from that of each; a part that is not there has not moved."""
    return math.hypot(*(weights[name] * shift for name, shift in parts.items() if name in weights))


def _specificities(effects: Sequence[PromptEffect], rounding: float) -> Iterator[Specificity]:
    controls = [effect for effect in effects if effect.role == "control"]
    for index, shift in enumerate(effects[0].shifts):
        own = shift.relative
        mean = sum(one.shifts[index].relative for one in controls) / len(controls) if controls else None
        ratio, reason = None, ""
        if mean is None:
            reason = "there is no control prompt to compare with"
        elif not own and not mean:
            reason = "it moves neither the training prompt nor the control prompts"
        elif not mean:
            reason = "infinite: it moves the training prompt, and no control prompt at all"
        elif max(own, mean) < rounding:
            reason = "it moves less than rounding does"
        else:
            ratio = own / mean
            if mean < rounding:
                ratio, reason = None, f"beyond {own / rounding:.3g}: control prompts move less than rounding does"
        yield Specificity(shift.name, own, mean, ratio, reason)


def _cut(view: ModelView, prompts: Sequence[Prompt]) -> Iterator[str]:
    """What the model does not read of a prompt, in words."""
    for prompt, texts in zip(prompts, view.cut_texts(), strict=True):
        for text in texts:
            yield f"the {prompt.role} prompt is longer than the model reads; this is cut off: {text!r}"


def _chunks(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), _ROWS):
        yield items[start : start + _ROWS]
