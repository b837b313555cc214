"""What a loss sees of a model of a few numbers, in float64: exact enough for finite differences, and counting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from lora_forge.contracts import EncoderOutput, Tokens
from lora_forge.seeds import generator_for

LATENT = (2, 4, 4)
LENGTH, WIDTH = 5, 3
NUMBERS = 6  # of the LoRA of one prompt: three for the text, three for the denoiser
PROMPTS = ("an owl", "two red foxes")


def drawn(name: str, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator_for(name), dtype=torch.float64)


class SmallBatch:
    """As `lora_forge.batch.Batch`, for as many prompts as `weights` `(prompts, NUMBERS)` has rows.

    calls: of each call of the denoiser, how many rows it had, and whether it was adapted.
    """

    def __init__(self, weights: torch.Tensor) -> None:
        self.weights = weights
        self.prompts = len(weights)
        self.latent_shape = LATENT
        self.alphas_cumprod = torch.linspace(0.999, 0.01, 100, dtype=torch.float64)
        self.scale = 1.0
        self.calls: list[tuple[int, bool]] = []

    def randn(self, name: str, *shape: int) -> torch.Tensor:
        return torch.stack([drawn(f"{name} of {prompt}", *shape) for prompt in PROMPTS[: self.prompts]])

    @property
    def tokens(self) -> dict[str, Tokens]:
        """A start token, as many words as there are, an end token, padding."""
        mask = torch.tensor([[position < 2 + len(p.split()) for position in range(LENGTH)] for p in PROMPTS]).long()
        return {"encoder": Tokens(mask, mask, ("", ""))}

    def adapted(self) -> dict[str, EncoderOutput]:
        return self.encode("{prompt}", adapted=True)

    def frozen(self) -> dict[str, EncoderOutput]:
        return self.encode("{prompt}", adapted=False)

    def encode(self, text: str, *, adapted: bool) -> dict[str, EncoderOutput]:
        states = torch.stack(
            [drawn(text.replace("{prompt}", prompt), LENGTH, WIDTH) for prompt in PROMPTS[: self.prompts]]
        )
        if adapted:
            states = states + self._lora()[:, None, :3] * states.tanh()
        return {"encoder": EncoderOutput(states, 2 * states, states.mean(dim=1))}

    def predict_noise(
        self, latents: torch.Tensor, timesteps: torch.Tensor, outputs: Mapping[str, EncoderOutput], *, adapted: bool
    ) -> torch.Tensor:
        self.calls.append((len(latents), adapted))
        with torch.set_grad_enabled(adapted and torch.is_grad_enabled()):
            return self._noise(latents, timesteps, outputs["encoder"], adapted)

    def _noise(
        self, latents: torch.Tensor, timesteps: torch.Tensor, output: EncoderOutput, adapted: bool
    ) -> torch.Tensor:
        text = output.pooled @ drawn("text", WIDTH, 2) + output.penultimate_hidden_state.mean(1) @ drawn(
            "too", WIDTH, 2
        )
        inner = latents.tanh() + text[:, :, None, None] + (timesteps / 100)[:, None, None, None]
        if adapted:
            own = self._lora().repeat_interleave(len(latents) // self.prompts, dim=0)[:, 3:, None, None, None]
            inner = inner + own[:, 0] * latents + own[:, 1] * inner.square() + own[:, 2]
        return inner.tanh() + 0.3 * inner

    def cross_attention(
        self, latents: torch.Tensor, timesteps: torch.Tensor, outputs: Mapping[str, EncoderOutput], *, adapted: bool
    ) -> dict[str, torch.Tensor]:
        """Of layers of 4 by 4, 4 by 4 and 2 by 2 places."""
        noise = self.predict_noise(latents, timesteps, outputs, adapted=adapted)
        places = torch.cat([noise, latents[:, :1]], dim=1)
        scores = torch.einsum("pchw,ptc->phwt", places, outputs["encoder"].last_hidden_state)
        small = scores.view(-1, 2, 2, 2, 2, LENGTH).mean(dim=(2, 4))
        return {
            "first": (scores / 50).softmax(-1),
            "second": (scores.flip(1) / 30).softmax(-1),
            "small": small.softmax(-1),
        }

    @contextmanager
    def negated(self) -> Iterator[None]:
        self.scale = -self.scale
        try:
            yield
        finally:
            self.scale = -self.scale

    def _lora(self) -> torch.Tensor:
        return self.scale * self.weights


def small_batch(prompts: int = 2, size: float = 0.3) -> Any:
    """With weights that have a gradient."""
    return SmallBatch((size * drawn("weights", len(PROMPTS), NUMBERS))[:prompts].requires_grad_())
