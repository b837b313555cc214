"""What a loss sees: one object through which the model's outputs are asked for, never the model.

A `ModelView` runs the model, at most once per step for each thing asked of the adapted model and once
per run for each thing asked of the frozen one. A `Batch` is a loss's own window on it, which allows
what the loss declares it needs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace

import torch

from lora_forge.bank import Bank, BankSlot
from lora_forge.contracts import Backend, EncoderOutput, TargetLayer, Tokens
from lora_forge.errors import ObjectiveError, UndeclaredNeed
from lora_forge.seeds import generator_for

OWN_PROMPT = "{prompt}"
Texts = tuple[tuple[str, tuple[str, ...]], ...]  # ((encoder, one text per prompt), …)


def texts_by_encoder(
    encoders: Sequence[str], first: Sequence[str], prompts: Sequence[tuple[str, str | None]]
) -> dict[str, list[str]]:
    """One text per prompt for each encoder; those that are not `first` read the second text of a prompt, if given."""
    return {
        encoder: [text if encoder in first or text_2 is None else text_2 for text, text_2 in prompts]
        for encoder in encoders
    }


class ModelView:
    """Runs the adapted and the frozen model on texts, and remembers what it has run.

    texts: for each encoder in use, one text per prompt. seeds: one per prompt. step counts `begin_step`.
    content_only: whether nothing in a step reads beyond a text's end. Then, if the encoders are causal, a step runs
    them on no more tokens than the longest of the texts it asks for has; outside the step loop always on all.
    """

    def __init__(
        self, backend: Backend, slot: BankSlot, texts: Mapping[str, Sequence[str]], seeds: Sequence[int], device: str
    ) -> None:
        self.backend, self.slot = backend, slot
        self.seeds, self.device = tuple(seeds), device
        self.step = 0
        self.content_only = False
        self._cut = False  # whether the outputs of the moment end with the texts
        self.encoders = tuple(texts)
        self.texts: Texts = tuple((encoder, tuple(rows)) for encoder, rows in texts.items())
        self.prompts = len(self.seeds)
        self._tokens: dict[tuple[str, tuple[str, ...]], Tokens] = {}
        self._short: dict[Texts, dict[str, Tokens]] = {}
        self._adapted: dict[tuple[Texts, bool, bool, bool], dict[str, EncoderOutput]] = {}
        self._frozen: dict[tuple[Texts, bool, bool, bool], dict[str, EncoderOutput]] = {}

    def begin_step(self) -> None:
        """Forget what the adapted model said; its weights have moved."""
        self._adapted.clear()
        self.step += 1
        self._cut = self.content_only and self.backend.causal

    def begin_evaluation(self, draw: int = 1) -> None:
        """As `begin_step`, outside the step loop: losses see the noise of the first step again, or of another."""
        self._adapted.clear()
        self.step = draw
        self._cut = False

    def tokens(self, texts: Texts) -> dict[str, Tokens]:
        """Tokens per encoder, `(prompts, length)`, on the model's device: as many as the outputs have."""
        tokens = self._all_tokens(texts)
        if not self._cut:
            return tokens
        if texts not in self._short:  # the length is read off the device once, not at every step
            length = _length(tokens.values())
            self._short[texts] = {
                encoder: replace(
                    one, input_ids=one.input_ids[:, :length], attention_mask=one.attention_mask[:, :length]
                )
                for encoder, one in tokens.items()
            }
        return self._short[texts]

    def _all_tokens(self, texts: Texts) -> dict[str, Tokens]:
        for encoder, rows in texts:
            if (encoder, rows) not in self._tokens:
                tokens = self.backend.tokenize(encoder, rows)
                self._tokens[encoder, rows] = replace(
                    tokens,
                    input_ids=tokens.input_ids.to(self.device),
                    attention_mask=tokens.attention_mask.to(self.device),
                )
        return {encoder: self._tokens[encoder, rows] for encoder, rows in texts}

    def cut_texts(self) -> list[list[str]]:
        """Per prompt, the ends of its texts that the model does not read."""
        tokens = self._all_tokens(self.texts).values()
        return [sorted({one.cut[row] for one in tokens} - {""}) for row in range(self.prompts)]

    def outputs(self, texts: Texts, *, adapted: bool, masked: bool) -> dict[str, EncoderOutput]:
        """Outputs per encoder, each `(prompts, …)` float32; run once per step (adapted) or per run (frozen)."""
        cache = self._adapted if adapted else self._frozen
        # Up to a text's end, masks change nothing. What was made without a graph is of no use where one is wanted.
        key = (texts, masked and not self._cut, self._cut, adapted and torch.is_grad_enabled())
        if key not in cache:
            if adapted:
                cache[key] = self._run(texts, key[1])
            else:
                with torch.no_grad(), self.slot.frozen():
                    cache[key] = self._run(texts, key[1])
        return cache[key]

    def _run(self, texts: Texts, masked: bool) -> dict[str, EncoderOutput]:
        tokens = self.tokens(texts)
        return {encoder: self.backend.encode(encoder, tokens[encoder], masked=masked) for encoder in tokens}


def _length(tokens: Iterable[Tokens]) -> int:
    """Up to the end of the longest text, of all encoders: their outputs are joined position by position."""
    return max(int(one.attention_mask.any(dim=0).nonzero().max()) + 1 for one in tokens)


class Batch:
    """The batch as one loss sees it: `prompts` prompts, each with LoRA weights of its own.

    All outputs are float32 with a leading prompts dimension. `length` below is the encoder's, or where all losses of
    the run read the content's tokens only (`LossSpec.tokens`), that of the longest of the texts asked for.
    """

    def __init__(self, view: ModelView, needs: Collection[str], loss: str) -> None:
        self._view, self._needs, self._loss = view, frozenset(needs), loss

    @property
    def prompts(self) -> int:
        """How many prompts the batch holds."""
        return self._view.prompts

    @property
    def encoders(self) -> tuple[str, ...]:
        """The text encoders in use: those with target layers, or all if the objective needs them."""
        return self._view.encoders

    @property
    def texts(self) -> dict[str, tuple[str, ...]]:
        """The prompts' texts, per encoder."""
        return dict(self._view.texts)

    @property
    def tokens(self) -> dict[str, Tokens]:
        """Token ids and masks per encoder, `(prompts, length)`."""
        return self._view.tokens(self._view.texts)

    def adapted(self, *, masked: bool = False) -> dict[str, EncoderOutput]:
        """What each encoder, with the LoRA in it, makes of the prompts.

        masked: pass the attention mask, so that padding is not attended to.
        Raises UndeclaredNeed unless the loss needs `text`.
        """
        self._require("text")
        return self._view.outputs(self._view.texts, adapted=True, masked=masked)

    def frozen(self, *, masked: bool = False) -> dict[str, EncoderOutput]:
        """What each frozen encoder makes of the prompts; without gradient, computed once per run."""
        self._require("text")
        return self._view.outputs(self._view.texts, adapted=False, masked=masked)

    def encode(self, text: str | Sequence[str], *, adapted: bool, masked: bool = False) -> dict[str, EncoderOutput]:
        """The same for other text: one for all prompts, or one per prompt.

        In a text, `{prompt}` stands for the prompt's own, as that encoder reads it.
        """
        self._require("text")
        return self._view.outputs(self._filled(text), adapted=adapted, masked=masked)

    def tokenize(self, text: str | Sequence[str]) -> dict[str, Tokens]:
        """Token ids and masks of other text per encoder, `(prompts, length)`, as `encode` reads it."""
        return self._view.tokens(self._filled(text))

    def _filled(self, text: str | Sequence[str]) -> Texts:
        rows = (text,) * self.prompts if isinstance(text, str) else tuple(text)
        if len(rows) != self.prompts:
            raise ValueError(f"{len(rows)} texts for {self.prompts} prompts")
        return tuple(
            (encoder, tuple(row.replace(OWN_PROMPT, prompt) for row, prompt in zip(rows, prompts, strict=True)))
            for encoder, prompts in self._view.texts
        )

    def conditioning(self, outputs: Mapping[str, EncoderOutput]) -> dict[str, torch.Tensor]:
        """What the denoiser is conditioned on, by name, each `(prompts, …)`, from encoder outputs."""
        self._require("text")
        return self._view.backend.conditioning(outputs)

    def randn(self, name: str, *shape: int) -> torch.Tensor:
        """Normal noise `(prompts, *shape)`, float32, new at every step.

        It depends on a prompt's seed, the loss, the step and `name`, and on nothing else: neither on the
        device nor on the prompts beside it.
        """
        rows = [
            torch.randn(shape, generator=generator_for(f"{seed}/{self._loss}/{self._view.step}/{name}"))
            for seed in self._view.seeds
        ]
        return torch.stack(rows).to(self._view.device)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of one latent, `(channels, height, width)`."""
        self._require("noise_prediction")
        return self._view.backend.latent_shape()

    def predict_noise(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        outputs: Mapping[str, EncoderOutput],
        *,
        adapted: bool,
    ) -> torch.Tensor:
        """Noise predicted for `latents` `(prompts, *latent_shape)` at `timesteps` `(prompts,)`.

        outputs: the conditioning, as `adapted()`, `frozen()` or `encode()` gave it. The frozen model
        predicts without gradient. Several predictions for each prompt are made in one call where everything has
        `prompts · k` rows, the k of one prompt side by side. Raises UndeclaredNeed unless the loss needs
        `noise_prediction`.
        """
        self._require("noise_prediction")
        if adapted:
            return self._view.backend.predict_noise(latents, timesteps, outputs)
        with torch.no_grad(), self._view.slot.frozen():
            return self._view.backend.predict_noise(latents, timesteps, outputs)

    @property
    def alphas_cumprod(self) -> torch.Tensor:
        """ᾱ of each training timestep, `(train_timesteps,)` float32: √ᾱ_t · x + √(1 - ᾱ_t) · noise is a latent at t.

        Raises UndeclaredNeed unless the loss needs `noise_prediction`, ObjectiveError where the model's family has
        no such schedule.
        """
        self._require("noise_prediction")
        try:
            return self._view.backend.alphas_cumprod().to(self._view.device)
        except NotImplementedError as error:
            needed = f"loss {self._loss!r} needs the model's noise schedule"
            raise ObjectiveError(f"{needed}, which the backend of {self._view.backend.family} does not give") from error

    def cross_attention(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        outputs: Mapping[str, EncoderOutput],
        *,
        adapted: bool,
    ) -> dict[str, torch.Tensor]:
        """What each place of the denoiser's layers attends to in the text, as it predicts noise for `latents`.

        Called as `predict_noise`. Per cross-attention layer, by its path, `(prompts, height, width, tokens)` float32:
        probabilities over the tokens, the mean over the layer's heads. The frozen model's are without gradient.
        Raises UndeclaredNeed unless the loss needs `attention`.
        """
        self._require("attention")
        if adapted:
            return self._view.backend.cross_attention(latents, timesteps, outputs)
        with torch.no_grad(), self._view.slot.frozen():
            return self._view.backend.cross_attention(latents, timesteps, outputs)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures `(prompts, 3, height, width)` float32 in [0, 1] of latents without noise, with gradient to them.

        Raises UndeclaredNeed unless the loss needs `vae`.
        """
        self._require("vae")
        return self._view.backend.decode(latents)

    @contextmanager
    def negated(self) -> Iterator[None]:
        """Within this, the adapted model has -ΔW in it: the LoRA used at the scale -1.

        What it gives there has a gradient as ever. The bank's scale changes its sign, for all prompts.
        """
        bank, kept = self._bank, self._view._adapted
        bank.scale, self._view._adapted = -bank.scale, {}
        try:
            yield
        finally:
            bank.scale, self._view._adapted = -bank.scale, kept

    @property
    def layers(self) -> tuple[TargetLayer, ...]:
        """The target layers, of all components, loaded or not."""
        return tuple(self._bank.layers.values())

    def weight(self, layer: TargetLayer) -> torch.Tensor:
        """A target layer's frozen weight `(out, in)`, float32, not to be changed.

        Raises UndeclaredNeed unless something that the loss needs has the layer's component loaded, ObjectiveError for
        a backend that gives no weights.
        """
        if type(self._view.backend).weight is Backend.weight:
            raise ObjectiveError(f"loss {self._loss!r} reads the model's weights, which its backend does not give")
        weight = self._view.backend.weight(layer.component, layer.name)
        if weight is None:
            raise UndeclaredNeed(
                f"loss {self._loss!r} asks for a weight of {layer.component}, which no need of its spec has loaded"
            )
        return weight

    def low_rank(self, layer: TargetLayer) -> tuple[torch.Tensor, torch.Tensor]:
        """A target layer's LoRA as left `(prompts, out, rank)` and right `(prompts, rank, in)`: ΔW is left @ right."""
        lora_a, lora_b = self._bank.pairs[layer.key]
        return self._bank.scale * lora_b, lora_a

    @property
    def _bank(self) -> Bank:
        bank = self._view.slot.bank
        assert bank is not None  # a loss is called with one in place
        return bank

    def _require(self, need: str) -> None:
        if need not in self._needs:
            raise UndeclaredNeed(f"loss {self._loss!r} asks for {need!r}, which its spec does not declare in `needs`")


def side_by_side(texts: Sequence[Mapping[str, EncoderOutput]]) -> dict[str, EncoderOutput]:
    """Several texts' outputs as one of `prompts · texts` rows, those of a prompt one after the other.

    So `Batch.predict_noise` takes them in one call, each row through its prompt's own LoRA.
    """
    return {
        encoder: EncoderOutput(
            *(
                torch.stack([getattr(text[encoder], field.name) for text in texts], dim=1).flatten(0, 1)
                for field in fields(EncoderOutput)
            )
        )
        for encoder in texts[0]
    }
