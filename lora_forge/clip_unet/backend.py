"""A backend for CLIP text encoders and diffusers' conditional UNet, where nothing is loaded before it is needed.

A family's own backend derives from it and says what is the family's: its `Family`, what the UNet is conditioned on,
and how that is handed over.
"""

from __future__ import annotations

import functools
import json
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from lora_forge.bank import BankLinear, BankSlot, inject
from lora_forge.clip_unet.architecture import layers_of_config, linear_layers
from lora_forge.clip_unet.attention_maps import kept_maps, unflattened
from lora_forge.clip_unet.belonging import CLIP, check_bare, foreign_encoder, foreign_unet, pipeline_components
from lora_forge.clip_unet.below import Below
from lora_forge.clip_unet.checkpointing import Checkpointing
from lora_forge.clip_unet.decoder import copied_decoder, decode, load_decoder
from lora_forge.clip_unet.encoders import canonical_name, load_encoder, ready_for_steps
from lora_forge.clip_unet.family import UNET, Family
from lora_forge.clip_unet.noise_schedule import alphas_cumprod, check_predicts_noise, shipped_schedule
from lora_forge.clip_unet.pipeline import SCHEDULER, load_model, load_pipeline
from lora_forge.clip_unet.sources import SingleFile, Source, open_source
from lora_forge.clip_unet.tiny import tiny_folder
from lora_forge.contracts import Backend, BackendRequest, EncoderOutput, TargetLayer, Tokens
from lora_forge.errors import ModelError

_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj", "to_q", "to_k", "to_v", "to_out.0")
_MLP = ("fc1", "fc2", "ff.net.0.proj", "ff.net.2")
_EMBEDDING = "text_model.embeddings.token_embedding.weight"
_BLOCKS = ("text_model.encoder.layers.", "down_blocks.", "mid_block.", "up_blocks.")


class ClipUnetBackend(Backend):
    """See `Backend`. `facts` are the family's; `modules` the components loaded so far."""

    facts: ClassVar[Family]
    causal = True
    target_groups = {
        "attention": lambda path: path.endswith(_ATTENTION),
        "attention+mlp": lambda path: path.endswith(_ATTENTION + _MLP),
        "all": lambda path: path.startswith(_BLOCKS),
    }

    @classmethod
    def open(
        cls, request: BackendRequest, configs: Path | None = None, *, gradient_checkpointing: bool = False
    ) -> Self:
        """A model from its files, or around a pipeline in memory. Raises ModelError.

        configs: the folder with configs and tokenizers for a single-file checkpoint, instead of the family's own.
        gradient_checkpointing: recompute activations of the UNet and the VAE in the backward pass.
        """
        if request.pipeline is not None:
            made = cls(None, request, dict(pipeline_components(request.pipeline, cls.facts)))
        else:
            made = cls(open_source(request.source, cls.facts, configs), request, {})
        made._recomputes = gradient_checkpointing
        return made

    @classmethod
    def recognizes(cls, source: str) -> bool:
        """Whether a source is a model of this family, told from its configs, or from a checkpoint's keys.

        Raises ModelError saying why not.
        """
        model = cls.open(BackendRequest(source, "cpu", "float32"))
        model.check_files(cls.facts.encoders if isinstance(model._source, SingleFile) else ())
        return True

    def __init__(self, source: Source | None, request: BackendRequest, modules: dict[str, Any]) -> None:
        self.family = self.facts.name
        self._source, self._request, self._modules = source, request, modules
        self._in_memory = {name: linear_layers(name, module) for name, module in modules.items()}
        self._before: dict[str, tuple[list[tuple[nn.Module, bool]], list[tuple[nn.Parameter, bool]]]] = {}
        self._adapted: dict[str, Any] = {}
        self._below: dict[str, Below] = {}
        self._tokenizers: dict[str, Any] = {}
        self._norms: dict[tuple[str, str], float] = {}
        self._decoder: Any = None
        self._alphas: torch.Tensor | None = None
        self._recomputes = False
        self._checkpointing = Checkpointing()
        self._checkpointed_before = False

    @abstractmethod
    def unet_arguments(self, latents: torch.Tensor, outputs: Mapping[str, EncoderOutput]) -> dict[str, Any]:
        """What the UNet is given beside latents and timesteps: keyword arguments, in the dtype and on the device of
        `latents` `(prompts, *latent_shape)`.
        """

    def architecture(self) -> dict[str, dict[str, tuple[int, int]]]:
        if self._source is None:
            return self._in_memory
        layers = {}
        configs = self._configs(self._source)
        for component in self.facts.components:
            config, kind = json.dumps(configs[component], sort_keys=True), self.facts.encoders.get(component)
            layers[component] = layers_of_config(component, kind, config)
        return layers

    def _configs(self, source: Source) -> dict[str, dict[str, Any]]:
        """Every component's config. Raises ModelError for a model of another family.

        The UNet's comes first: of another family it says more than the encoder that is missing.
        """
        unet = source.config(UNET)
        no_model_of_it = f"base model {source.name!r} is no {self.facts.title}"
        if reason := foreign_unet(unet, self.facts):
            raise ModelError(f"{no_model_of_it}: {reason}")
        configs = {UNET: unet}
        for encoder in self.facts.encoders:
            configs[encoder] = source.config(encoder)
            if reason := foreign_encoder(encoder, configs[encoder].get("model_type", CLIP)):
                raise ModelError(f"{no_model_of_it}: {reason}")
        return configs

    def check_files(self, components: Collection[str]) -> None:
        if self._source is None:
            return
        from safetensors import SafetensorError, safe_open

        self._configs(self._source)
        for component in components:
            keys: set[str] = set()
            for file in self._source.files_to_check(component):
                try:
                    with safe_open(file, framework="pt") as opened:  # checks the header, and the length against it
                        keys.update(opened.keys())
                except (SafetensorError, OSError) as error:
                    part = "" if isinstance(self._source, SingleFile) else f": {component}/{file.name}"
                    model = f"base model {self._source.name!r}{part}"
                    raise ModelError(f"{model} is broken or truncated: {error}") from error
            if component in self.facts.encoders:
                embedding = self._source.locate(component, _EMBEDDING)[0]
                if keys and not {embedding, embedding.removeprefix("text_model.")} & keys:
                    title = self.facts.title
                    raise ModelError(f"base model {self._source.name!r} is no {title}: it has no {embedding!r}")
                self._check_tokenizer(self._source, component)

    def load(self, components: Collection[str]) -> None:
        dtype = getattr(torch, self._request.dtype)
        if UNET in components:
            check_predicts_noise(self._scheduler_config(), self._named())
        for component in components:
            if component in self._in_memory and component not in self._before:
                module = self._modules[component]
                check_bare(component, module)
                training = [(child, child.training) for child in module.modules()]
                self._before[component] = (training, [(p, p.requires_grad) for p in module.parameters()])
                module.requires_grad_(False).eval()
                if component == UNET:
                    self._checkpointed_before = module.is_gradient_checkpointing
                    self._checkpoint(module)
            if component in self._modules:
                continue
            assert self._source is not None
            if component == UNET:
                module = load_model(self._source, UNET, dtype).to(self._request.device)
                self._checkpoint(module)
            else:
                kind = self.facts.encoders[component]
                encoder = load_encoder(component, kind, self._source, device=self._request.device, dtype=dtype)
                module = ready_for_steps(encoder)
            self._modules[component] = module

    def _checkpoint(self, module: Any) -> None:
        """Have a UNet or VAE recompute its activations, if that was asked for, or was on in a pipeline in memory."""
        if self._recomputes or module.is_gradient_checkpointing:
            module.enable_gradient_checkpointing(self._checkpointing)

    def adapt(self, layers: Sequence[TargetLayer], rank: int, alpha: float, slot: BankSlot) -> None:
        for component in dict.fromkeys(layer.component for layer in layers):
            module = self._modules[component]
            paths = {canonical_name(component, path): path for path, _ in module.named_modules()}
            names = {paths[layer.name]: layer.key for layer in layers if layer.component == component}
            self._adapted[component] = inject(module, names, rank, alpha, slot)
            self._checkpointing.slot = slot
            if component in self.facts.encoders:
                if component in self._below:
                    self._below[component].release()
                self._below[component] = Below(module, names)

    def release(self) -> None:
        for below in self._below.values():
            below.release()
        self._below.clear()
        for adapted in self._adapted.values():
            adapted.unload()
        self._adapted.clear()
        for training, flags in self._before.values():
            for child, flag in training:
                child.training = flag
            for parameter, required in flags:
                parameter.requires_grad_(required)
        if UNET in self._before:
            unet = self._modules[UNET]
            if self._checkpointed_before:
                unet.enable_gradient_checkpointing()
            elif self._recomputes:
                unet.disable_gradient_checkpointing()
        self._before.clear()
        self._modules = {name: module for name, module in self._modules.items() if name in self._in_memory}
        self._decoder = None

    def tokenize(self, encoder: str, texts: Sequence[str]) -> Tokens:
        tokenizer = self._tokenizer(encoder)
        length = tokenizer.model_max_length
        ids = tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt", verbose=False
        )
        cut = tuple(_cut_off(tokenizer, text, length - 2) for text in texts)
        return Tokens(ids["input_ids"], ids["attention_mask"], cut)

    def token_texts(self, encoder: str, tokens: Tokens) -> list[list[str]]:
        decode = functools.partial(self._tokenizer(encoder).decode, clean_up_tokenization_spaces=False)
        # What each stands for; of a letter that is cut in two, neither half has a text.
        return [[decode([token]).strip() for token in row] for row in tokens.input_ids.tolist()]

    def encode(self, encoder: str, tokens: Tokens, *, masked: bool) -> EncoderOutput:
        module = self._modules[encoder]
        device = next(module.parameters()).device
        if self._adapted and encoder not in self._below:
            self._below[encoder] = Below(module, ())  # it has no target layers
        below = self._below.get(encoder)
        with below.of(tokens.input_ids, masked=masked) if below else nullcontext():
            output = module(
                tokens.input_ids.to(device),
                attention_mask=tokens.attention_mask.to(device) if masked else None,
                output_hidden_states=True,
            )
        pooled = output.text_embeds if "text_embeds" in output else output.pooler_output
        return EncoderOutput(output.last_hidden_state.float(), output.hidden_states[-2].float(), pooled.float())

    def latent_shape(self) -> tuple[int, int, int]:
        config = self._modules[UNET].config
        return (config.in_channels, config.sample_size, config.sample_size)

    def predict_noise(
        self, latents: torch.Tensor, timesteps: torch.Tensor, outputs: Mapping[str, EncoderOutput]
    ) -> torch.Tensor:
        unet = self._modules[UNET]
        latents = latents.to(unet.device, unet.dtype)
        noise = unet(latents, timesteps.to(unet.device), **self.unet_arguments(latents, outputs))
        return noise.sample.float()  # type: ignore[no-any-return]

    def alphas_cumprod(self) -> torch.Tensor:
        if self._alphas is None:
            self._alphas = alphas_cumprod(self._scheduler_config(), self._named())
        return self._alphas

    def cross_attention(
        self, latents: torch.Tensor, timesteps: torch.Tensor, outputs: Mapping[str, EncoderOutput]
    ) -> dict[str, torch.Tensor]:
        maps: dict[str, torch.Tensor] = {}
        self._checkpointing.keeps_maps = True
        try:
            with kept_maps(self._modules[UNET], maps):
                self.predict_noise(latents, timesteps, outputs)
        finally:
            self._checkpointing.keeps_maps = False
        return {path: unflattened(one, *latents.shape[-2:]) for path, one in maps.items()}

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        if self._decoder is None:
            source, device = self._source, self._request.device
            self._decoder = copied_decoder(self._request.pipeline) if source is None else load_decoder(source, device)
            self._checkpoint(self._decoder)
        return decode(self._decoder, latents)

    def _scheduler_config(self) -> Mapping[str, Any]:
        if self._source is None:
            config = getattr(getattr(self._request.pipeline, "scheduler", None), "config", {})
        else:
            config = self._source.optional_json(SCHEDULER)
        return config or shipped_schedule(self.facts.configs)

    def _named(self) -> str:
        """The model in messages."""
        if self._source is None:
            return f"the {type(self._request.pipeline).__name__} in memory"
        return f"base model {self._source.name!r}"

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

    def weight(self, component: str, layer: str) -> torch.Tensor | None:
        module = self._modules.get(component)
        if module is None:
            return None
        path = layer if component == UNET or hasattr(module, "text_model") else layer.removeprefix("text_model.")
        child = module.get_submodule(path)
        linear: Any = child.base_layer if isinstance(child, BankLinear) else child
        return linear.weight.detach().float()  # type: ignore[no-any-return]

    def pipeline(self) -> Any:
        if self._source is not None:
            return load_pipeline(self._source, self.facts, getattr(torch, self._request.dtype))
        if self._adapted:
            raise ModelError("the pipeline in memory has a run's layers in it; release() takes them out")
        return self._request.pipeline

    def usage(self, path: str, prompt: str) -> str:
        lines = [f"pipe.load_lora_weights({path!r})", f"image = pipe({prompt!r}).images[0]"]
        if self._source is not None:
            tiny = self._request.source == self.facts.tiny.name
            model = str(tiny_folder(self.facts)) if tiny else self._request.source
            loader = "from_single_file" if model.endswith(".safetensors") else "from_pretrained"
            # Without a dtype the parts of a checkpoint stored in half precision would not come out in one.
            device = self._request.device
            dtype, move = ("float32", "") if device == "cpu" else ("float16", f".to({device!r})")
            pipe = f"diffusers.{self.facts.pipeline}.{loader}({model!r}, dtype=torch.{dtype}){move}"
            lines[:0] = ["import diffusers, torch", f"pipe = {pipe}"]
        return "\n".join(lines)

    def _check_tokenizer(self, source: Source, encoder: str) -> None:
        folder = self.facts.encoders[encoder].tokenizer
        try:
            tokenizer = self._tokenizer(encoder)
            merges = (source.tokenizer(folder) / "merges.txt").read_text(encoding="utf-8").splitlines()
            # Each token of the vocabulary is a byte, a byte that ends a word, a special one, or merged.
            whole = len(merges) >= tokenizer.vocab_size - 2 * 256 - len(tokenizer.all_special_tokens)
        except ModelError:
            raise
        except Exception as error:  # the tokenizer library's own, of no common type
            reason = " ".join(str(error).split())
            raise ModelError(f"base model {source.name!r}: {folder} is broken or truncated: {reason}") from error
        if not whole:
            raise ModelError(f"base model {source.name!r}: {folder} is truncated: merges.txt is too short")

    def _tokenizer(self, encoder: str) -> Any:
        if encoder not in self._tokenizers:
            folder = self.facts.encoders[encoder].tokenizer
            if self._source is None:
                self._tokenizers[encoder] = getattr(self._request.pipeline, folder)
            else:
                from transformers import CLIPTokenizer

                self._tokenizers[encoder] = CLIPTokenizer.from_pretrained(self._source.tokenizer(folder))
        return self._tokenizers[encoder]


def _cut_off(tokenizer: Any, text: str, room: int) -> str:
    """The end of `text` that does not fit into `room` tokens."""
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = encoded["offset_mapping"]
        return text[offsets[room][0] :].strip() if len(offsets) > room else ""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return tokenizer.decode(ids[room:]).strip()  # type: ignore[no-any-return]
