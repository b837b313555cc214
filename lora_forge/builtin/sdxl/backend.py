"""The SDXL backend: two CLIP text encoders, a UNet conditioned on both, and nothing loaded before it is needed."""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_forge.bank import BankLinear, BankSlot, inject
from lora_forge.builtin.sdxl.encoders import canonical_name, empty_encoder, load_encoder
from lora_forge.builtin.sdxl.sources import Source, open_source
from lora_forge.builtin.sdxl.tiny import TINY, tiny_sdxl_folder
from lora_forge.contracts import Backend, BackendRequest, EncoderOutput, TargetLayer, Tokens
from lora_forge.errors import ModelError

if TYPE_CHECKING:
    from lora_forge.builtin.backends import SdxlOptions

ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
COMPONENTS = (*ENCODERS, "unet")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj", "to_q", "to_k", "to_v", "to_out.0")
_MLP = ("fc1", "fc2", "ff.net.0.proj", "ff.net.2")
_EMBEDDING = "text_model.embeddings.token_embedding.weight"
_BLOCKS = ("text_model.encoder.layers.", "down_blocks.", "mid_block.", "up_blocks.")


def open_sdxl(request: BackendRequest, options: SdxlOptions) -> Backend:
    """An SDXL from its files, or around a pipeline in memory. Raises ModelError."""
    if request.pipeline is not None:
        return SdxlBackend(None, request, dict(_pipeline_components(request.pipeline)))
    return SdxlBackend(open_source(request.source, options.config), request, {})


class SdxlBackend(Backend):
    """See `Backend`. `modules` are the components loaded so far."""

    family = "sdxl"
    target_groups = {
        "attention": lambda path: path.endswith(_ATTENTION),
        "attention+mlp": lambda path: path.endswith(_ATTENTION + _MLP),
        "all": lambda path: path.startswith(_BLOCKS),
    }

    def __init__(self, source: Source | None, request: BackendRequest, modules: dict[str, Any]) -> None:
        self._source, self._request, self._modules = source, request, modules
        self._in_memory = {name: _linear_layers(name, module) for name, module in modules.items()}
        self._before: dict[str, tuple[list[tuple[nn.Module, bool]], list[tuple[nn.Parameter, bool]]]] = {}
        self._adapted: dict[str, Any] = {}
        self._tokenizers: dict[str, Any] = {}
        self._norms: dict[tuple[str, str], float] = {}

    def architecture(self) -> dict[str, dict[str, tuple[int, int]]]:
        if self._source is None:
            return self._in_memory
        return {
            component: _layers_of_config(component, json.dumps(self._source.config(component), sort_keys=True))
            for component in COMPONENTS
        }

    def check_files(self, components: Collection[str]) -> None:
        if self._source is None:
            return
        from safetensors import SafetensorError, safe_open

        for component in components:
            keys: set[str] = set()
            for file in self._source.files_to_check(component):
                try:
                    with safe_open(file, framework="pt") as opened:  # checks the header, and the length against it
                        keys.update(opened.keys())
                except (SafetensorError, OSError) as error:
                    raise ModelError(
                        f"base model {self._source.name!r}: {component}/{file.name} is broken or truncated: {error}"
                    ) from error
            if component in ENCODERS:
                embedding = self._source.locate(component, _EMBEDDING)[0]
                if keys and not {embedding, embedding.removeprefix("text_model.")} & keys:
                    raise ModelError(f"base model {self._source.name!r} is no SDXL: it has no {embedding!r}")
                self._check_tokenizer(self._source, component)

    def load(self, components: Collection[str]) -> None:
        dtype = getattr(torch, self._request.dtype)
        for component in components:
            if component in self._in_memory and component not in self._before:
                module = self._modules[component]
                _check_bare(component, module)
                training = [(child, child.training) for child in module.modules()]
                self._before[component] = (training, [(p, p.requires_grad) for p in module.parameters()])
                module.requires_grad_(False).eval()
            if component in self._modules:
                continue
            assert self._source is not None
            if component == "unet":
                module = self._load_unet(self._source, dtype)
            else:
                module = load_encoder(component, self._source, device=self._request.device, dtype=dtype)
            self._modules[component] = module

    def _load_unet(self, source: Source, dtype: torch.dtype) -> Any:
        try:
            return source.load_unet(dtype).to(self._request.device).requires_grad_(False).eval()
        except ModelError:
            raise
        except Exception as error:  # diffusers' own, of no common type
            raise ModelError(f"base model {source.name!r}: unet: {' '.join(str(error).split())}") from error

    def adapt(self, layers: Sequence[TargetLayer], rank: int, alpha: float, slot: BankSlot) -> None:
        for component in dict.fromkeys(layer.component for layer in layers):
            module = self._modules[component]
            paths = {canonical_name(component, path): path for path, _ in module.named_modules()}
            names = {paths[layer.name]: layer.key for layer in layers if layer.component == component}
            self._adapted[component] = inject(module, names, rank, alpha, slot)

    def release(self) -> None:
        for adapted in self._adapted.values():
            adapted.unload()
        self._adapted.clear()
        for training, flags in self._before.values():
            for child, flag in training:
                child.training = flag
            for parameter, required in flags:
                parameter.requires_grad_(required)
        self._before.clear()
        self._modules = {name: module for name, module in self._modules.items() if name in self._in_memory}

    def tokenize(self, encoder: str, texts: Sequence[str]) -> Tokens:
        tokenizer = self._tokenizer(encoder)
        length = tokenizer.model_max_length
        ids = tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt", verbose=False
        )
        cut = tuple(_cut_off(tokenizer, text, length - 2) for text in texts)
        return Tokens(ids["input_ids"], ids["attention_mask"], cut)

    def encode(self, encoder: str, tokens: Tokens, *, masked: bool) -> EncoderOutput:
        module = self._modules[encoder]
        device = next(module.parameters()).device
        output = module(
            tokens.input_ids.to(device),
            attention_mask=tokens.attention_mask.to(device) if masked else None,
            output_hidden_states=True,
        )
        pooled = output.text_embeds if "text_embeds" in output else output.pooler_output
        return EncoderOutput(output.last_hidden_state.float(), output.hidden_states[-2].float(), pooled.float())

    def conditioning(self, outputs: Mapping[str, EncoderOutput]) -> dict[str, torch.Tensor]:
        parts = {f"{encoder} penultimate": output.penultimate_hidden_state for encoder, output in outputs.items()}
        if "text_encoder_2" in outputs:
            parts["text_encoder_2 pooled"] = outputs["text_encoder_2"].pooled
        return parts

    def latent_shape(self) -> tuple[int, int, int]:
        config = self._modules["unet"].config
        return (config.in_channels, config.sample_size, config.sample_size)

    def predict_noise(
        self, latents: torch.Tensor, timesteps: torch.Tensor, outputs: Mapping[str, EncoderOutput]
    ) -> torch.Tensor:
        unet = self._modules["unet"]
        device, dtype = unet.device, unet.dtype
        states = torch.cat([outputs[encoder].penultimate_hidden_state for encoder in ENCODERS], dim=-1)
        # The pipeline's own micro-conditioning: original size, crop, target size, all uncropped. One latent
        # pixel of SDXL's VAE is eight of the image.
        side = 8.0 * self.latent_shape()[1]
        sizes = torch.tensor([[side, side, 0.0, 0.0, side, side]], device=device).expand(len(latents), -1)
        added = {"text_embeds": outputs["text_encoder_2"].pooled.to(dtype), "time_ids": sizes.to(dtype)}
        noise = unet(
            latents.to(device, dtype),
            timesteps.to(device),
            encoder_hidden_states=states.to(dtype),
            added_cond_kwargs=added,
        )
        return noise.sample.float()  # type: ignore[no-any-return]

    def weight_norm(self, component: str, layer: str) -> float | None:
        module = self._modules.get(component)
        if module is None:
            return None
        if (component, layer) not in self._norms:
            paths = {canonical_name(component, path): child for path, child in module.named_modules()}
            for name, child in paths.items():
                if isinstance(child, BankLinear):
                    weight = child.base_layer.weight
                    self._norms[component, name] = float(torch.linalg.vector_norm(weight, dtype=torch.float32))
        return self._norms.get((component, layer))

    def usage(self, path: str, prompt: str) -> str:
        lines = [f"pipe.load_lora_weights({path!r})", f"image = pipe({prompt!r}).images[0]"]
        if self._source is not None:
            model = str(tiny_sdxl_folder()) if self._request.source == TINY else self._request.source
            loader = "from_single_file" if model.endswith(".safetensors") else "from_pretrained"
            # Without a dtype the parts of a checkpoint stored in half precision would not come out in one.
            device = self._request.device
            dtype, move = ("float32", "") if device == "cpu" else ("float16", f".to({device!r})")
            pipe = f"diffusers.StableDiffusionXLPipeline.{loader}({model!r}, dtype=torch.{dtype}){move}"
            lines[:0] = ["import diffusers, torch", f"pipe = {pipe}"]
        return "\n".join(lines)

    def _check_tokenizer(self, source: Source, encoder: str) -> None:
        try:
            tokenizer = self._tokenizer(encoder)
            merges = (source.tokenizer(ENCODERS[encoder]) / "merges.txt").read_text(encoding="utf-8").splitlines()
            # Each token of the vocabulary is a byte, a byte that ends a word, a special one, or merged.
            whole = len(merges) >= tokenizer.vocab_size - 2 * 256 - len(tokenizer.all_special_tokens)
        except ModelError:
            raise
        except Exception as error:  # the tokenizer library's own, of no common type
            reason = " ".join(str(error).split())
            raise ModelError(
                f"base model {source.name!r}: {ENCODERS[encoder]} is broken or truncated: {reason}"
            ) from error
        if not whole:
            raise ModelError(f"base model {source.name!r}: {ENCODERS[encoder]} is truncated: merges.txt is too short")

    def _tokenizer(self, encoder: str) -> Any:
        if encoder not in self._tokenizers:
            if self._source is None:
                self._tokenizers[encoder] = getattr(self._request.pipeline, ENCODERS[encoder])
            else:
                from transformers import CLIPTokenizer

                self._tokenizers[encoder] = CLIPTokenizer.from_pretrained(self._source.tokenizer(ENCODERS[encoder]))
        return self._tokenizers[encoder]


def _pipeline_components(pipeline: Any) -> list[tuple[str, Any]]:
    components = [(name, getattr(pipeline, name, None)) for name in COMPONENTS]
    missing = [name for name, module in components if not isinstance(module, nn.Module)]
    if missing:
        raise ModelError(f"{type(pipeline).__name__} is no SDXL pipeline: it has no {', '.join(missing)}")
    for name, module in components:
        _check_bare(name, module)
    return components


def _check_bare(component: str, module: Any) -> None:
    if hasattr(module, "_hf_hook"):
        raise ModelError(f"{component} is offloaded; a pipeline in memory has to be on one device")
    if hasattr(module, "peft_config"):
        raise ModelError(f"{component} already carries a LoRA; unload it first (pipe.unload_lora_weights())")


@functools.lru_cache(maxsize=16)
def _layers_of_config(component: str, config: str) -> dict[str, tuple[int, int]]:
    """The linear layers an architecture has, from a component built on the meta device."""
    try:
        if component == "unet":
            from diffusers import UNet2DConditionModel

            with torch.device("meta"):
                module: nn.Module = UNet2DConditionModel.from_config(json.loads(config))
        else:
            module = empty_encoder(component, json.loads(config))
    except Exception as error:
        reason = " ".join(str(error).split())  # the library's own, of many lines
        raise ModelError(f"{component}: its config.json makes no model: {reason}") from error
    return _linear_layers(component, module)


def _linear_layers(component: str, module: nn.Module) -> dict[str, tuple[int, int]]:
    return {
        canonical_name(component, name): (layer.out_features, layer.in_features)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    }


def _cut_off(tokenizer: Any, text: str, room: int) -> str:
    """The end of `text` that does not fit into `room` tokens."""
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = encoded["offset_mapping"]
        return text[offsets[room][0] :].strip() if len(offsets) > room else ""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return tokenizer.decode(ids[room:]).strip()  # type: ignore[no-any-return]
