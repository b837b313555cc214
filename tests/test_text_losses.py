"""The losses that look at the text encoders alone: the contract, each formula again by hand, and what they train."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import encoder_blocks

import lora_forge
from lora_forge.batch import Batch
from lora_forge.builtin.losses import lora_forge_losses
from lora_forge.clip_unet.family import Family
from lora_forge.contracts import EncoderOutput
from lora_forge.options import describe_options
from lora_forge.plugins import Plugin, Supplied, build
from lora_forge.records import LossSpec
from lora_forge.testing import check_loss
from lora_forge.testing.stage import PROMPTS, personal_bank, tiny_stage

SPECS = {spec.name: spec for spec in lora_forge_losses()}
# Each loss as it is by default, and with its options turned the other way.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("embedding_magnitude", {}),
    ("embedding_magnitude", {"tokens": "content", "layer": "penultimate"}),
    ("conditioning_magnitude", {}),
    ("conditioning_magnitude", {"anchor": 0.0}),
    ("embed_write", {}),
    ("embed_write", {"target": "a sailing ship in a storm"}),
    ("embed_direction", {}),
    ("embed_direction", {"concept": "oil painting of {prompt}", "scale": -2.0, "ahead": 0.25}),
    ("embed_preserve", {}),
    ("embed_preserve", {"neutral": ("a dog",)}),
    ("pooled_align", {}),
    ("pooled_align", {"target": "mist"}),
    ("prompt_contrast", {}),
    ("prompt_contrast", {"target": "a brass owl, {prompt}", "negative": ("a cat",), "temperature": 0.5}),
]
each_case = pytest.mark.parametrize(
    ("name", "options"), CASES, ids=[f"{name} {' '.join(options)}".strip() for name, options in CASES]
)
PEOPLE = (0, 1, 2)


def options_of(name: str, options: Mapping[str, Any]) -> Any:
    return SPECS[name].options(**options)


def loss_of(name: str, options: Mapping[str, Any]) -> Callable[[Batch], torch.Tensor]:
    return build(Supplied(SPECS[name], Plugin("given:it", "it", "", "")), options_of(name, options))


@each_case
def test_it_keeps_the_contract_of_a_loss(name: str, options: dict[str, Any]) -> None:
    check_loss(SPECS[name], options_of(name, options))


@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda spec: spec.name)
def test_it_says_its_formula_and_source_and_every_option_what_it_is(spec: LossSpec) -> None:
    assert spec.formula
    assert spec.source
    assert all(field.metadata["help"] for field in dataclasses.fields(spec.options))


@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda spec: spec.name)
def test_it_is_on_the_page_of_objectives_with_its_options_and_their_defaults(spec: LossSpec) -> None:
    page = (Path(__file__).parent.parent / "docs" / "objectives.md").read_text(encoding="utf-8")
    (section,) = re.findall(rf"^## {spec.name}\n(.*?)(?:^## |\Z)", page, re.MULTILINE | re.DOTALL)
    shown = dict(re.findall(r"^\| `(\w+)` \| `?(.+?)`? \|", section, re.MULTILINE))
    defaults = {info.name: info.default for info in describe_options(spec.options)}
    told = {name: json.dumps(value) if isinstance(value, list) else str(value) for name, value in defaults.items()}
    assert shown == {name: value.replace("None", "none") for name, value in told.items()}
    assert "Source: " in " ".join(section.split())


# Each formula once more, with numpy in double precision, one prompt and one part at a time: from the encoders' outputs,
# the number of a text's own tokens, and what is known of each family's conditioning.


@dataclass(frozen=True)
class Said:
    """What one prompt's model makes of a text: per encoder the states (length, width), pooled (width,), own tokens."""

    last: list[np.ndarray]
    penultimate: list[np.ndarray]
    pooled: list[np.ndarray]
    own: list[int]
    family: str

    @property
    def conditioning(self) -> list[np.ndarray]:
        """Of each part the rows that are the text's own; one row where it is one vector."""
        if self.family == "sd15":
            return [self.last[0][: self.own[0]]]
        rows = [state[:own] for state, own in zip(self.penultimate, self.own, strict=True)]
        return [*rows, self.pooled[1][None]]

    @property
    def padded_conditioning(self) -> list[np.ndarray]:
        return self.last if self.family == "sd15" else [*self.penultimate, self.pooled[1][None]]


Ask = Callable[[str, bool], list[Said]]


@pytest.fixture(scope="module")
def asked(model: str, family: Family) -> Iterator[tuple[Batch, Ask]]:
    """A batch of three prompts on a model with random LoRA weights, and what it is to be asked by hand."""
    stage = tiny_stage(model, frozenset({"text"}))
    view = stage.view(PEOPLE)
    view.begin_step()
    stage.slot.bank = personal_bank(stage.layers, PEOPLE)

    def ask(text: str, adapted: bool, masked: bool = False) -> list[Said]:
        """`text`, in which {prompt} is filled in, of each prompt's own model."""
        texts = [text.replace("{prompt}", PROMPTS[person]) for person in PEOPLE]
        everyone: list[list[Any]] = [[] for _ in PEOPLE]
        for encoder in family.encoders:
            tokens = stage.backend.tokenize(encoder, texts)
            if adapted:
                output = stage.backend.encode(encoder, tokens, masked=masked)
            else:
                with stage.slot.frozen():
                    output = stage.backend.encode(encoder, tokens, masked=masked)
            for row, own in enumerate(tokens.attention_mask.sum(1).tolist()):
                everyone[row].append((output, row, own))
        return [said(one) for one in everyone]

    def said(outputs: list[tuple[EncoderOutput, int, int]]) -> Said:
        def of(name: str) -> list[np.ndarray]:
            return [getattr(output, name)[row].detach().double().numpy() for output, row, _ in outputs]

        own = [tokens for _, _, tokens in outputs]
        return Said(of("last_hidden_state"), of("penultimate_hidden_state"), of("pooled"), own, family.name)

    yield Batch(view, {"text"}, "it"), ask
    stage.slot.bank = None


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / (np.sqrt(one @ one) * np.sqrt(other @ other)))


def embedding_magnitude(ask: Any, o: Any, p: int) -> float:
    said = ask("{prompt}", True, True)[p]
    states = said.last if o.layer == "last" else said.penultimate
    rows = [s if o.tokens == "all" else s[:n] for s, n in zip(states, said.own, strict=True)]
    return -float(np.mean([sum(abs(number) for number in row.flatten()) / row.size for row in rows]))


def conditioning_magnitude(ask: Any, o: Any, p: int) -> float:
    parts = zip(ask("{prompt}", True)[p].conditioning, ask("{prompt}", False)[p].conditioning, strict=True)
    return float(np.mean([o.anchor * ((c - c0) ** 2).sum() / (c0**2).sum() - abs(c).mean() for c, c0 in parts]))


def embed_write(ask: Any, o: Any, p: int) -> float:
    parts = zip(ask("{prompt}", True)[p].padded_conditioning, ask(o.target, False)[p].padded_conditioning, strict=True)
    return float(np.mean([((c - goal) ** 2).mean() for c, goal in parts]))


def embed_preserve(ask: Any, o: Any, p: int) -> float:
    values = []
    for text in o.neutral:
        parts = zip(ask(text, True)[p].padded_conditioning, ask(text, False)[p].padded_conditioning, strict=True)
        values += [((c - c0) ** 2).mean() for c, c0 in parts]
    return float(np.mean(values))


def embed_direction(ask: Any, o: Any, p: int) -> float:
    values = []
    texts = [("{prompt}", True), ("{prompt}", False), (o.concept, False), ("", False)]
    for c, c0, concept, nothing in zip(*(ask(*text)[p].conditioning for text in texts), strict=True):
        d, goal = concept.mean(0) - nothing.mean(0), o.scale
        if o.ahead is not None:
            t = (c - c0).mean(0) @ d / (d @ d)
            goal = min(max(t, 0) + o.ahead, o.scale) if o.scale >= 0 else max(min(t, 0) - o.ahead, o.scale)
        values.append(np.mean([(c[i] - c0[i] - goal * d) ** 2 for i in range(len(c))]))
    return float(np.mean(values))


def pooled_align(ask: Any, o: Any, p: int) -> float:
    now, goal = ask("{prompt}", True)[p], ask(o.target, False)[p]
    pairs = list(zip(now.pooled, goal.pooled, strict=True))
    return float(np.mean([1 - cosine(*pair) for pair in (pairs if now.family == "sd15" else pairs[1:])]))


def prompt_contrast(ask: Any, o: Any, p: int) -> float:
    now = ask("{prompt}", True)[p].conditioning
    likeness = []
    for text in (o.target, *o.negative):
        other = ask(text, False)[p].conditioning
        likeness.append(np.mean([cosine(c[-1], c0[-1]) for c, c0 in zip(now, other, strict=True)]))
    shares = np.exp(np.array(likeness) / o.temperature)
    return float(-np.log(shares[0] / shares.sum()))


@each_case
def test_its_value_is_the_formula_computed_by_hand_in_double_precision(
    asked: tuple[Batch, Ask], name: str, options: dict[str, Any]
) -> None:
    batch, ask = asked
    values = loss_of(name, options)(batch).tolist()
    expected = [globals()[name](ask, options_of(name, options), person) for person in PEOPLE]
    assert values == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert len({round(value, 6) for value in expected}) == len(PEOPLE), "each prompt has its own"


def test_by_default_embedding_magnitude_is_bit_for_bit_what_the_specification_says(model: str, tmp_path: Path) -> None:
    plugin = tmp_path / "plain.py"
    plugin.write_text("""
from lora_forge import LossSpec, hookimpl

def plain(batch):
    means = [output.last_hidden_state.abs().mean(dim=(1, 2)) for output in batch.adapted(masked=True).values()]
    return -sum(means[1:], means[0]) / len(means)

@hookimpl
def lora_forge_losses():
    yield LossSpec(name="plain", summary="it", factory=plain)
""")
    ours = lora_forge.run("an owl", model, iterations=5)
    theirs = lora_forge.run("an owl", model, iterations=5, loss="plain", plugins=[plugin])
    for component, layers in ours.weights.items():
        for layer, pair in layers.items():
            assert torch.equal(pair["lora_B"], theirs.weights[component][layer]["lora_B"])


@each_case
def test_what_it_cannot_reach_is_what_it_does_not_read(
    model: str, family: Family, name: str, options: dict[str, Any]
) -> None:
    """The last block of an encoder whose penultimate state is read, and an encoder whose pooled vector is not."""
    result = lora_forge.run("an owl", model, iterations=1, loss=[{"name": name, "options": options}])
    inert = {layer for layer in result.inert if not layer.startswith("unet.")}
    first, *others = encoder_blocks(model)
    blind: tuple[str, ...] = ()
    if options.get("layer") == "penultimate":
        blind = tuple(last_block(model, encoder) for encoder in (first, *others))
    elif family.name == "sdxl" and name == "pooled_align":
        blind = (f"{first}.",)
    elif family.name == "sdxl" and name != "embedding_magnitude":
        blind = (last_block(model, first),)
    every = {f"{component}.{layer}" for component, layers in result.weights.items() for layer in layers}
    assert inert == {layer for layer in every if layer.startswith(blind)} if blind else not inert


def last_block(model: str, encoder: str) -> str:
    return f"{encoder}.text_model.encoder.layers.{encoder_blocks(model)[encoder] - 1}."


@pytest.mark.parametrize("name", [name for name in SPECS if name != "embed_preserve"])
def test_training_makes_it_smaller(model: str, name: str) -> None:
    result = lora_forge.run(
        "a steampunk owl", model, iterations=15, loss=name, optimizer={"name": "adamw", "options": {"lr": 1e-3}}
    )
    assert result.loss_after < result.loss_before


def test_embed_preserve_moves_nothing_by_itself_and_holds_other_prompts_beside_another_term(model: str) -> None:
    def after(*loss: str) -> Any:
        optimizer = {"name": "adamw", "options": {"lr": 1e-3}}
        return lora_forge.run("a steampunk owl", model, iterations=20, loss=list(loss), optimizer=optimizer, l2=0)

    alone, without, beside = (
        after("embed_preserve"),
        after("embed_write", "embed_preserve:0"),
        after("embed_write", "embed_preserve:10"),
    )
    assert not any(pair["lora_B"].any() for layers in alone.weights.values() for pair in layers.values())
    assert beside.after.terms["embed_preserve"] < 0.5 * without.after.terms["embed_preserve"]
    assert beside.after.terms["embed_write"] < beside.before.terms["embed_write"]
