"""A model family of two text encoders and a denoiser, each a few linear layers, made in a millisecond."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lora_forge import FileLayout
from lora_forge.bank import BankLinear, BankSlot, inject
from lora_forge.contracts import Backend, BackendRequest, EncoderOutput, TargetLayer, Tokens

ENCODERS = ("small", "large")
COMPONENTS = (*ENCODERS, "denoiser")
CONDITIONING = ("small pooled", "large pooled")
LAYOUT = FileLayout(prefixes={"small": "lora_te1", "large": "lora_te2", "denoiser": "lora_unet"})
REACHES = {"text": ENCODERS, "noise_prediction": COMPONENTS, "attention": COMPONENTS, "vae": ()}
LENGTH, WIDTH = 40, 6
LATENT = (2, 3, 3)


class ToyEncoder(nn.Module):
    """Bytes, each mixed with the mean of all that the mask leaves in."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.first, self.second = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)
        self.projection = nn.Linear(WIDTH, 5)
        self.dropout = nn.Dropout(0.1)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None) -> EncoderOutput:
        hidden = self.embedding(ids)
        weight = torch.ones_like(ids) if mask is None else mask
        shares = (weight / weight.sum(1, keepdim=True).clamp_min(1))[..., None]
        penultimate = self.first(hidden + (hidden * shares).sum(1, keepdim=True))
        last = self.dropout(self.second(torch.tanh(penultimate)))
        return EncoderOutput(last, penultimate, self.projection((last * shares).sum(1)))


class ToyDenoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.condition, self.inner = nn.Linear(10, 7), nn.Linear(18, 7)
        self.outer = nn.Linear(7, 18)

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.inner(latents.flatten(1)) + self.condition(pooled) + timesteps[:, None] / 1000)
        noise: torch.Tensor = self.outer(hidden).view(latents.shape)
        return noise


class ToyBackend(Backend):
    """Keeps every rule; the breakers change a method each."""

    family = "toy"
    target_groups: Mapping[str, Callable[[str], bool]] = {"all": lambda path: True, "first": lambda p: p == "first"}
    components: tuple[str, ...] = COMPONENTS

    def __init__(self) -> None:
        self._modules: dict[str, nn.Module] = {}
        self._adapted: list[Any] = []

    def _new(self, component: str) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(COMPONENTS.index(component))
            return ToyDenoiser() if component == "denoiser" else ToyEncoder()

    def architecture(self) -> dict[str, dict[str, tuple[int, int]]]:
        return {
            component: {
                name: (layer.out_features, layer.in_features)
                for name, layer in self._new(component).named_modules()
                if isinstance(layer, nn.Linear)
            }
            for component in self.components
        }

    def check_files(self, components: Collection[str]) -> None:
        pass

    def load(self, components: Collection[str]) -> None:
        for component in components:
            if component not in self._modules:
                self._modules[component] = self._new(component).requires_grad_(False).eval()

    def adapt(self, layers: Sequence[TargetLayer], rank: int, alpha: float, slot: BankSlot) -> None:
        module = self._modules[layers[0].component]
        self._adapted.append(inject(module, {layer.name: layer.key for layer in layers}, rank, alpha, slot))

    def release(self) -> None:
        for adapted in self._adapted:
            adapted.unload()
        self._adapted.clear()

    def tokenize(self, encoder: str, texts: Sequence[str]) -> Tokens:
        rows = [text.encode() for text in texts]
        ids = torch.tensor([[*row[:LENGTH], *[0] * (LENGTH - len(row))] for row in rows])
        cut = tuple(row[LENGTH:].decode(errors="ignore") for row in rows)
        return Tokens(ids, (ids != 0).long(), cut)

    def encode(self, encoder: str, tokens: Tokens, *, masked: bool) -> EncoderOutput:
        output: EncoderOutput = self._modules[encoder](tokens.input_ids, tokens.attention_mask if masked else None)
        return output

    def conditioning(self, outputs: Mapping[str, EncoderOutput]) -> dict[str, torch.Tensor]:
        return {f"{encoder} pooled": output.pooled for encoder, output in outputs.items()}

    def latent_shape(self) -> tuple[int, int, int]:
        return LATENT

    def predict_noise(
        self, latents: torch.Tensor, timesteps: torch.Tensor, outputs: Mapping[str, EncoderOutput]
    ) -> torch.Tensor:
        pooled = torch.cat([outputs[encoder].pooled for encoder in ENCODERS], dim=1)
        noise: torch.Tensor = self._modules["denoiser"](latents, timesteps, pooled)
        return noise

    def alphas_cumprod(self) -> torch.Tensor:
        return torch.linspace(0.99, 0.01, 10)

    def cross_attention(
        self, latents: torch.Tensor, timesteps: torch.Tensor, outputs: Mapping[str, EncoderOutput]
    ) -> dict[str, torch.Tensor]:
        """Of two tokens, in each of nine places."""
        noise = ToyBackend.predict_noise(self, latents, timesteps, outputs)
        return {"outer": noise.view(-1, *LATENT[1:], LATENT[0]).softmax(dim=-1)}

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.einsum("kc,pchw->pkhw", torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]), latents).sigmoid()

    def weight_norm(self, component: str, layer: str) -> float | None:
        module = self._modules.get(component)
        if module is None:
            return None
        linear = module.get_submodule(layer)
        frozen: Any = linear.get_base_layer() if isinstance(linear, BankLinear) else linear
        return float(frozen.weight.norm())

    def usage(self, path: str, prompt: str) -> str:
        return f"toy.load({path!r})\ntoy.draw({prompt!r})"


class TextOnly(ToyBackend):
    """No denoiser, and nothing of noise."""

    components = ENCODERS
    latent_shape = Backend.latent_shape
    predict_noise = Backend.predict_noise
    alphas_cumprod = Backend.alphas_cumprod
    cross_attention = Backend.cross_attention
    decode = Backend.decode


def is_toy(source: str) -> bool:
    """What the record says of itself with `recognizes`."""
    return source == "toy"


def open_toy(kind: type[ToyBackend] = ToyBackend) -> Callable[[BackendRequest], Backend]:
    """A factory that makes a backend of this kind."""

    def factory(request: BackendRequest) -> Backend:
        assert request.source == "toy", request.source
        return kind()

    return factory
