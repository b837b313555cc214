"""A model family that draws nothing: one text encoder of the transformers library, and no UNet.

A plugin file as a third party would write it, with nothing but what plugins may import. Its models are folders that
transformers saved a BERT in; `tiny_reader` is one that is made on the spot. Tokens are the bytes of a text.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_forge import BackendSpec, FileLayout, hookimpl
from lora_forge.contracts import Backend, BackendRequest, EncoderOutput, TargetLayer, Tokens
from lora_forge.errors import ModelError

if TYPE_CHECKING:
    import torch

    from lora_forge.bank import BankSlot

__lora_forge_api__ = 1

READER = "reader"
TINY = "tiny_reader"
PADDING, START, END = 256, 257, 258


@dataclass(frozen=True)
class Options:
    length: int = field(default=48, metadata={"help": "tokens of a text", "min": 8, "max": 64})


def tiny_config() -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=END + 1,
        hidden_size=24,
        intermediate_size=40,
        num_attention_heads=3,
        num_hidden_layers=3,
        max_position_embeddings=64,
        pad_token_id=PADDING,
        initializer_range=0.2,
    )


def is_reader(source: str) -> bool:
    if source == TINY:
        return True
    if not (Path(source) / "config.json").is_file():
        raise ModelError(f"base model {source!r} is no folder with a config.json")
    from transformers import AutoConfig

    return bool(AutoConfig.from_pretrained(source).model_type == "bert")


def open_reader(request: BackendRequest, options: Options) -> Backend:
    if request.pipeline is not None:
        raise ModelError("this backend works on no pipeline in memory")
    if not is_reader(request.source):
        raise ModelError(f"base model {request.source!r} is no BERT")
    return ReaderBackend(request, options)


class ReaderBackend(Backend):
    family = "bert"
    target_groups = {
        "attention": lambda path: ".attention." in path,
        "all": lambda path: True,
    }

    def __init__(self, request: BackendRequest, options: Options) -> None:
        self._request, self._length = request, options.length
        self._model: Any = None
        self._frozen: dict[str, Any] = {}
        self._adapted: Any = None

    def architecture(self) -> dict[str, dict[str, tuple[int, int]]]:
        import torch
        from transformers import AutoConfig, BertModel

        source = self._request.source
        config = tiny_config() if source == TINY else AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            layers = _linear_layers(BertModel(config))
        return {READER: {path: (layer.out_features, layer.in_features) for path, layer in layers.items()}}

    def check_files(self, components: Collection[str]) -> None:
        if self._request.source != TINY and not (Path(self._request.source) / "model.safetensors").is_file():
            raise ModelError(f"base model {self._request.source!r} has no model.safetensors")

    def load(self, components: Collection[str]) -> None:
        import torch
        from transformers import BertModel

        if READER not in components or self._model is not None:
            return
        if self._request.source == TINY:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model: Any = BertModel(tiny_config())
        else:
            model = BertModel.from_pretrained(self._request.source)
        dtype = getattr(torch, self._request.dtype)
        self._model = model.to(device=self._request.device, dtype=dtype).requires_grad_(False).eval()
        self._frozen = _linear_layers(self._model)

    def adapt(self, layers: Sequence[TargetLayer], rank: int, alpha: float, slot: BankSlot) -> None:
        from lora_forge.bank import inject

        self._adapted = inject(self._model, {layer.name: layer.key for layer in layers}, rank, alpha, slot)

    def release(self) -> None:
        if self._adapted is not None:
            self._adapted.unload()
        self._model, self._adapted, self._frozen = None, None, {}

    def tokenize(self, encoder: str, texts: Sequence[str]) -> Tokens:
        import torch

        ids = torch.full((len(texts), self._length), PADDING)
        cut = []
        for row, text in enumerate(texts):
            content = text.encode()
            kept = content[: self._length - 2]
            ids[row, : len(kept) + 2] = torch.tensor([START, *kept, END])
            cut.append(content[len(kept) :].decode(errors="ignore").strip())
        return Tokens(ids, (ids != PADDING).long(), tuple(cut))

    def encode(self, encoder: str, tokens: Tokens, *, masked: bool) -> EncoderOutput:
        device = self._model.device
        mask = tokens.attention_mask.to(device) if masked else None
        output = self._model(tokens.input_ids.to(device), attention_mask=mask, output_hidden_states=True)
        last, penultimate, pooled = output.last_hidden_state, output.hidden_states[-2], output.pooler_output
        return EncoderOutput(last.float(), penultimate.float(), pooled.float())

    def conditioning(self, outputs: Mapping[str, EncoderOutput]) -> dict[str, torch.Tensor]:
        return {f"{encoder} states": output.last_hidden_state for encoder, output in outputs.items()}

    def weight_norm(self, component: str, layer: str) -> float | None:
        frozen = self._frozen.get(layer)
        return None if frozen is None else float(frozen.weight.float().norm())

    def usage(self, path: str, prompt: str) -> str:
        return f"from safetensors.torch import load_file\n\nlora = load_file({path!r})"


def _linear_layers(model: Any) -> dict[str, Any]:
    from torch import nn

    return {path: layer for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}


@hookimpl
def lora_forge_backends() -> Iterator[BackendSpec]:
    shared: dict[str, Any] = {
        "options": Options,
        "factory": open_reader,
        "components": (READER,),
        "encoders": (READER,),
        "reaches": {"text": (READER,)},
        "conditioning": (f"{READER} states",),
        "tiny": TINY,
    }
    layout = FileLayout(prefixes={READER: "lora_reader"}, metadata={"modelspec.architecture": "bert/lora"})
    yield BackendSpec(name="text_only", summary="a BERT", layout=layout, recognizes=is_reader, **shared)
    yield BackendSpec(name="nameless", summary="a BERT whose layers no user interface has names for", **shared)
