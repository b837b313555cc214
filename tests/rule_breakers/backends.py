"""Backends that each break one rule: the toy one, with one method changed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lora_forge import BackendSpec, FileLayout
from lora_forge.bank import BankSlot
from lora_forge.contracts import Backend, BackendRequest, EncoderOutput, TargetLayer, Tokens
from rule_breakers import Breaker
from rule_breakers.toy_backend import (
    COMPONENTS,
    CONDITIONING,
    ENCODERS,
    LATENT,
    LAYOUT,
    REACHES,
    TextOnly,
    ToyBackend,
    is_toy,
    open_toy,
)


def spec(factory: Any, **settings: Any) -> BackendSpec:
    made = open_toy(factory) if isinstance(factory, type) else factory
    declared: dict[str, Any] = {"components": COMPONENTS, "encoders": ENCODERS, "reaches": REACHES}
    declared |= {"conditioning": CONDITIONING, "layout": LAYOUT, "recognizes": is_toy, "tiny": "toy"}
    return BackendSpec(name="breaker", summary="breaks a rule", factory=made, **{**declared, **settings})


GOOD = spec(ToyBackend)
TEXT_ONLY = spec(TextOnly, components=ENCODERS, reaches={"text": ENCODERS}, layout=None, recognizes=None)


def refuses(request: BackendRequest) -> Backend:
    raise FileNotFoundError(f"no model {request.source}")


def gives_a_module(request: BackendRequest) -> Any:
    return nn.Linear(2, 2)


def recognizes_nothing(source: str) -> bool:
    return False


def recognizes_anything(source: str) -> bool:
    return True


def recognizes_folders(source: str) -> bool:
    raise NotADirectoryError(source)


class Nameless(ToyBackend):
    family = ""


class ForgetsDenoiser(ToyBackend):
    components = ENCODERS


class BareComponent(ToyBackend):
    def architecture(self) -> dict[str, dict[str, tuple[int, int]]]:
        return {**super().architecture(), "denoiser": {}}


class OddSizes(ToyBackend):
    def architecture(self) -> Any:
        return {c: {name: str(size) for name, size in layers.items()} for c, layers in super().architecture().items()}


class EmptyGroup(ToyBackend):
    target_groups = {"all": lambda path: True, "attention": lambda path: "attention" in path}


class NoGroups(ToyBackend):
    target_groups = {}


class Trainable(ToyBackend):
    def load(self, components: Collection[str]) -> None:
        super().load(components)
        self._modules["denoiser"].get_submodule("outer").requires_grad_(True)


class Hidden(ToyBackend):
    """Its parameters cannot be seen, only what they do."""

    def __init__(self) -> None:
        super().__init__()
        self._factor = torch.ones((), requires_grad=True)

    def encode(self, encoder: str, tokens: Tokens, *, masked: bool) -> EncoderOutput:
        output = super().encode(encoder, tokens, masked=masked)
        return replace(output, pooled=output.pooled * self._factor)


class ChangedTokens(ToyBackend):
    def tokenize(self, encoder: str, texts: Sequence[str]) -> Tokens:
        return self.change(super().tokenize(encoder, texts), texts)

    def change(self, tokens: Tokens, texts: Sequence[str]) -> Tokens:
        raise NotImplementedError


class Int32(ChangedTokens):
    def change(self, tokens: Tokens, texts: Sequence[str]) -> Tokens:
        return replace(tokens, input_ids=tokens.input_ids.int())


class FlatTokens(ChangedTokens):
    def change(self, tokens: Tokens, texts: Sequence[str]) -> Tokens:
        return replace(tokens, input_ids=tokens.input_ids.flatten())


class Silent(ChangedTokens):
    def change(self, tokens: Tokens, texts: Sequence[str]) -> Tokens:
        return replace(tokens, cut=("",) * len(texts))


class AsLongAsTheLongest(ChangedTokens):
    def change(self, tokens: Tokens, texts: Sequence[str]) -> Tokens:
        longest = min(max(len(text.encode()) for text in texts), 40)
        return replace(
            tokens, input_ids=tokens.input_ids[:, :longest], attention_mask=tokens.attention_mask[:, :longest]
        )


class ChangedOutputs(ToyBackend):
    def encode(self, encoder: str, tokens: Tokens, *, masked: bool) -> EncoderOutput:
        return self.change(super().encode(encoder, tokens, masked=masked), masked)

    def change(self, output: EncoderOutput, masked: bool) -> EncoderOutput:
        raise NotImplementedError


class Half(ChangedOutputs):
    def change(self, output: EncoderOutput, masked: bool) -> EncoderOutput:
        return replace(output, pooled=output.pooled.half())


class PooledPerPosition(ChangedOutputs):
    def change(self, output: EncoderOutput, masked: bool) -> EncoderOutput:
        return replace(output, pooled=output.last_hidden_state)


class NanWhereMasked(ChangedOutputs):
    def change(self, output: EncoderOutput, masked: bool) -> EncoderOutput:
        return replace(output, last_hidden_state=output.last_hidden_state * torch.nan) if masked else output


class Centred(ChangedOutputs):
    def change(self, output: EncoderOutput, masked: bool) -> EncoderOutput:
        return replace(output, pooled=output.pooled - 0.5 * output.pooled.mean(0, keepdim=True))


class NoConditioning(ToyBackend):
    def conditioning(self, outputs: Mapping[str, EncoderOutput]) -> dict[str, torch.Tensor]:
        return super().conditioning(outputs) if len(outputs) > 1 else {}


class OtherConditioning(ToyBackend):
    def conditioning(self, outputs: Mapping[str, EncoderOutput]) -> dict[str, torch.Tensor]:
        return {f"{encoder} last": output.last_hidden_state for encoder, output in outputs.items()}


class FlatConditioning(ToyBackend):
    def conditioning(self, outputs: Mapping[str, EncoderOutput]) -> dict[str, torch.Tensor]:
        return {"all": torch.cat([output.pooled.flatten() for output in outputs.values()])}


class NoNoise(ToyBackend):
    predict_noise = Backend.predict_noise


class FlatNoise(ToyBackend):
    def predict_noise(self, *arguments: Any) -> torch.Tensor:
        return super().predict_noise(*arguments).flatten(1)


class RisingSchedule(ToyBackend):
    def alphas_cumprod(self) -> torch.Tensor:
        return super().alphas_cumprod().flip(0)


class NoAttention(ToyBackend):
    cross_attention = Backend.cross_attention


class Scores(ToyBackend):
    """Attention before the softmax."""

    def cross_attention(self, *arguments: Any) -> dict[str, torch.Tensor]:
        return {path: one.log() for path, one in super().cross_attention(*arguments).items()}


class FlatAttention(ToyBackend):
    def cross_attention(self, *arguments: Any) -> dict[str, torch.Tensor]:
        return {path: one.flatten(1, 2) for path, one in super().cross_attention(*arguments).items()}


class AttentionWithoutText(ToyBackend):
    def cross_attention(self, latents: torch.Tensor, timesteps: torch.Tensor, outputs: Any) -> dict[str, torch.Tensor]:
        cut = {name: replace(output, pooled=output.pooled.detach()) for name, output in outputs.items()}
        return super().cross_attention(latents, timesteps, cut)


class NoDecoder(ToyBackend):
    decode = Backend.decode


class BrightPictures(ToyBackend):
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return 255 * super().decode(latents)


class CutPictures(ToyBackend):
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return super().decode(latents.detach())


class Training(ToyBackend):
    def load(self, components: Collection[str]) -> None:
        super().load(components)
        self._modules["large"].train()


class NormBeforeLoad(ToyBackend):
    def weight_norm(self, component: str, layer: str) -> float | None:
        return super().weight_norm(component, layer) or 1.0


class NoNorm(ToyBackend):
    def weight_norm(self, component: str, layer: str) -> float | None:
        return None


class Rescales(ToyBackend):
    def adapt(self, layers: Sequence[TargetLayer], rank: int, alpha: float, slot: BankSlot) -> None:
        super().adapt(layers, rank, alpha, slot)
        for parameter in self._modules[layers[0].component].parameters():
            parameter.data.mul_(1.01)


class ForgetsAnEncoder(ToyBackend):
    def adapt(self, layers: Sequence[TargetLayer], rank: int, alpha: float, slot: BankSlot) -> None:
        if layers[0].component != "large":
            super().adapt(layers, rank, alpha, slot)


class ForgetsLayers(ToyBackend):
    def adapt(self, layers: Sequence[TargetLayer], rank: int, alpha: float, slot: BankSlot) -> None:
        super().adapt(layers[:2], rank, alpha, slot)


class SlotOfItsOwn(ToyBackend):
    """Never hears of slot.frozen()."""

    def adapt(self, layers: Sequence[TargetLayer], rank: int, alpha: float, slot: BankSlot) -> None:
        super().adapt(layers, rank, alpha, _Always(slot))


class _Always(BankSlot):
    def __init__(self, slot: BankSlot) -> None:
        self.__dict__["slot"] = slot

    def __getattr__(self, name: str) -> Any:
        return True if name == "active" else self.slot.bank


class Reverses(ToyBackend):
    """Gives each prompt's encoders the LoRA of another one."""

    def encode(self, encoder: str, tokens: Tokens, *, masked: bool) -> EncoderOutput:
        turned = replace(tokens, input_ids=tokens.input_ids.flip(0), attention_mask=tokens.attention_mask.flip(0))
        output = super().encode(encoder, turned, masked=masked)
        return EncoderOutput(
            output.last_hidden_state.flip(0), output.penultimate_hidden_state.flip(0), output.pooled.flip(0)
        )


class CutsText(ToyBackend):
    def predict_noise(self, latents: torch.Tensor, timesteps: torch.Tensor, outputs: Any) -> torch.Tensor:
        cut = {name: replace(output, pooled=output.pooled.detach()) for name, output in outputs.items()}
        return super().predict_noise(latents, timesteps, cut)


class LeavesLora(ToyBackend):
    def release(self) -> None:
        self._adapted.clear()


class LeavesChange(ToyBackend):
    def release(self) -> None:
        super().release()
        for parameter in self._modules["small"].parameters():
            parameter.data.add_(0.01)


class Thaws(ToyBackend):
    def release(self) -> None:
        super().release()
        self._modules["denoiser"].requires_grad_(True)


class NoUsage(ToyBackend):
    def usage(self, path: str, prompt: str) -> str:
        return "load the file"


class HalfAPipeline(ToyBackend):
    def pipeline(self) -> Any:
        return SimpleNamespace(small=nn.Linear(1, 1), large=nn.Linear(1, 1))


class PipelineOfItsOwn(ToyBackend):
    def pipeline(self) -> Any:
        return _Draws()


class _Draws:
    small, large, denoiser = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)

    def __call__(self, prompt: str) -> None: ...


class Raises(ToyBackend):
    def check_files(self, components: Collection[str]) -> None:
        raise ValueError("no files here")


def breaker(what: str, factory: Any, rule: str, *words: str, **settings: Any) -> Breaker:
    return Breaker(what, spec(factory, **settings), rule, words)


TextReaches: Callable[..., dict[str, tuple[str, ...]]] = lambda *names: {**REACHES, "text": names}  # noqa: E731

BREAKERS = [
    breaker("declares no component", ToyBackend, "record", "no components", components=()),
    breaker("declares a foreign encoder", ToyBackend, "record", "clip", "not among", encoders=("small", "clip")),
    breaker("reaches for no need", ToyBackend, "record", "sound: no such need", reaches={"sound": ("small",)}),
    breaker("reaches a foreign component", ToyBackend, "record", "vae", "not among", reaches={"text": ("vae",)}),
    breaker(
        "has a layout of a foreign component",
        ToyBackend,
        "record",
        "speaks of vae",
        "not among",
        layout=FileLayout(prefixes={"small": "lora_te", "vae": "lora_vae"}),
    ),
    breaker("has a layout of another type", ToyBackend, "record", "FileLayout", "'kohya'", layout="kohya"),
    breaker("has no tiny model", ToyBackend, "tiny", "BackendSpec(tiny=", "without a download", tiny=""),
    breaker("cannot open its tiny model", refuses, "opens", "'toy'", "FileNotFoundError: no model toy", "backends.py"),
    breaker("is no backend", gives_a_module, "opens", "a Linear", "lora_forge.contracts.Backend"),
    breaker("has no family", Nameless, "opens", "names no family"),
    breaker("does not recognize its model", ToyBackend, "opens", "its own", "'toy'", recognizes=recognizes_nothing),
    breaker("recognizes any model", ToyBackend, "opens", "claim every base model", recognizes=recognizes_anything),
    breaker(
        "fails to recognize",
        ToyBackend,
        "opens",
        "NotADirectoryError: toy",
        "backends.py",
        recognizes=recognizes_folders,
    ),
    breaker(
        "has no such recognizer", ToyBackend, "opens", "No module named 'not_there'", recognizes="not_there:is_toy"
    ),
    breaker("lists too few components", ForgetsDenoiser, "architecture", "lists large, small", "denoiser"),
    breaker("lists a component without layers", BareComponent, "architecture", "no linear layer of denoiser"),
    breaker("gives sizes as text", OddSizes, "architecture", "small.first", "(out, in)", "integers"),
    breaker("has a target group of nothing", EmptyGroup, "target_groups", "'attention'", "none of the 9 layers"),
    breaker("has no target groups", NoGroups, "target_groups", "target_groups"),
    breaker("freezes not all", Trainable, "frozen", "2 parameters", "denoiser", "outer.weight", "requires_grad_"),
    breaker("trains something hidden", Hidden, "frozen", "without a LoRA", "pooled of small", "freeze"),
    breaker("gives ids of 32 bits", Int32, "tokens", "input_ids of small", "torch.int32", "int64"),
    breaker("gives flat ids", FlatTokens, "tokens", "shape (120,)", "(rows, length)"),
    breaker("does not tell what is cut", Silent, "tokens", "cut of small", "did not fit"),
    breaker("pads to the longest", AsLongAsTheLongest, "tokens", "40 tokens of a long text, 15 of a short", "pad"),
    breaker("encodes in half precision", Half, "encode", "pooled of small", "torch.float16", "float32"),
    breaker("pools nothing", PooledPerPosition, "encode", "pooled of small", "shape (3, 40, 6)", "(prompts, width)"),
    breaker("encodes to NaN if masked", NanWhereMasked, "encode", "last_hidden_state of small (masked) is NaN"),
    breaker("needs all encoders", NoConditioning, "conditioning", "of small", "{}", "encoders are missing"),
    breaker(
        "flattens the conditioning",
        FlatConditioning,
        "conditioning",
        "'all'",
        "first dimension is prompts",
        conditioning=("all",),
    ),
    breaker(
        "is conditioned on other parts than it says",
        OtherConditioning,
        "conditioning",
        "gives small last, large last",
        "declares conditioning=('small pooled', 'large pooled')",
    ),
    breaker("declares no conditioning", ToyBackend, "conditioning", "small pooled", "conditioning=()", conditioning=()),
    breaker("predicts no noise", NoNoise, "noise", "predict_noise()", "leave the need out"),
    breaker("flattens noise", FlatNoise, "noise", "shape (3, 18)", f"{(3, *LATENT)}"),
    breaker("turns its schedule round", RisingSchedule, "schedule", "from 0.01 to 0.99", "falling from timestep 0 on"),
    breaker("has no attention", NoAttention, "attention", "cross_attention() is not there"),
    breaker("gives scores of attention", Scores, "attention", "of outer", "sums to", "probabilities"),
    breaker("flattens attention", FlatAttention, "attention", "shape (3, 9, 2)", "(prompts, height, width, tokens)"),
    breaker(
        "attends to no text", AttentionWithoutText, "reaches", "'attention'", "large, small", "no gradient arrives"
    ),
    breaker("decodes nothing", NoDecoder, "decode", "decode() is not there"),
    breaker("gives pictures up to 255", BrightPictures, "decode", "give pictures in [0, 1]"),
    breaker("cuts the pictures' gradient", CutPictures, "decode", "no gradient", "at the latents"),
    breaker("trains its VAE", ToyBackend, "reaches", "'vae'", "declare ()", reaches={**REACHES, "vae": ("denoiser",)}),
    breaker("leaves dropout on", Training, "deterministic", "last_hidden_state of large", "eval()", "dropout"),
    breaker("subtracts the mean of all prompts", Centred, "independent", "pooled of small", "prompt 1 of 3", "alone"),
    breaker("has norms before it loads", NormBeforeLoad, "weight_norm", "before load()", "small.first", "None"),
    breaker("has no norms", NoNorm, "weight_norm", "small.first", "None", "loaded"),
    breaker("rescales when it adapts", Rescales, "adapt_zero", "B = 0", "of small", "of it"),
    breaker("forgets to adapt an encoder", ForgetsAnEncoder, "adapt", "of large", "does not change"),
    breaker("forgets to adapt layers", ForgetsLayers, "adapt", "left out 3 of the 9", "small.projection"),
    breaker("ignores slot.frozen", SlotOfItsOwn, "adapt", "within slot.frozen()", "of small"),
    breaker("gives prompts each other's LoRA", Reverses, "adapt", "prompt 3, whose own B is zero", "prompts-major"),
    breaker(
        "cuts the text's gradient", CutsText, "reaches", "'noise_prediction'", "large, small", "no gradient arrives"
    ),
    breaker("declares too little", ToyBackend, "reaches", "arrives at large", "'text'", reaches=TextReaches("small")),
    breaker("declares too much", ToyBackend, "reaches", "'text'", "denoiser", reaches=TextReaches(*COMPONENTS)),
    breaker("leaves the LoRA in", LeavesLora, "release", "after release()", "6 layers", "small"),
    breaker("leaves a change", LeavesChange, "release", "after release() and load()", "of small"),
    breaker(
        "thaws the model", Thaws, "release", "predicted noise, cross-attention of outer has a gradient", "unfrozen"
    ),
    breaker("shows no use", NoUsage, "usage", "my lora.safetensors", "load the file"),
    breaker(
        "gives half a pipeline", HalfAPipeline, "pipeline", "a SimpleNamespace without denoiser", "NotImplementedError"
    ),
    breaker("gives a pipeline that takes no LoRA", PipelineOfItsOwn, "pipeline", "_Draws", "load_lora_weights"),
    breaker("raises", Raises, "runs", "ValueError: no files here", "backends.py, line"),
]
