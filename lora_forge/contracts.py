"""What each kind of plugin is called with and must return, and the data that passes between rooms.

Shapes: `prompts` is the leading dimension of everything between tokens and saver.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import torch

    from lora_forge.bank import BankSlot
    from lora_forge.batch import Batch
    from lora_forge.records import FileLayout

# dict[component, dict[layer, {"lora_A": (prompts, rank, in), "lora_B": (prompts, out, rank)}]];
# a saver gets one prompt's, without the first dimension.
LoraWeights = dict[str, dict[str, dict[str, "torch.Tensor"]]]


LayerKey = tuple[str, str]  # (component, canonical path)


@dataclass(frozen=True)
class TargetLayer:
    """A linear layer that gets a LoRA: `name` is its canonical dotted path within `component`."""

    component: str
    name: str
    out_features: int
    in_features: int

    @property
    def key(self) -> LayerKey:
        return (self.component, self.name)


@dataclass(frozen=True)
class LayerGradient:
    """One prompt's gradient of the objective with respect to a layer's frozen weight, as its two factors.

    outputs: `(rows, out)`, the gradient at the layer's output. inputs: `(rows, in)`, the layer's input. Both float32
    on the CPU, not to be changed; there is a row for each token, or place of a latent, at each use of the layer.
    """

    outputs: torch.Tensor
    inputs: torch.Tensor

    def matrix(self) -> torch.Tensor:
        """The gradient itself, `outputsᵀ @ inputs`, `(out, in)`."""
        return self.outputs.T @ self.inputs

    def svd(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Thin singular value decomposition of `matrix()`: U `(out, k)`, σ `(k,)` descending, Vᵀ `(k, in)`.

        k is the least of rows, out and in. It is made from the QR decompositions of the factors, without the matrix,
        so that its cost goes with the rows. In each row of Vᵀ the number of largest size is positive.
        """
        import torch

        (q_out, r_out), (q_in, r_in) = torch.linalg.qr(self.outputs.T), torch.linalg.qr(self.inputs.T)
        inner_u, sigma, inner_vt = torch.linalg.svd(r_out @ r_in.T, full_matrices=False)
        u, vt = q_out @ inner_u, inner_vt @ q_in.T
        largest = vt.gather(1, vt.abs().argmax(dim=1, keepdim=True))
        signs = torch.where(largest < 0, -1.0, 1.0)
        return u * signs.T, sigma, vt * signs


@dataclass(frozen=True)
class InitialLayer:
    """What an initializer is given: the layer's sizes, the rank, and a CPU generator seeded for it alone.

    gradient: of the objective before the first step, B being zero, if the spec asks for it. None for a layer that the
        objective cannot reach, and where the gradient is not finite.
    """

    component: str
    name: str
    out_features: int
    in_features: int
    rank: int
    generator: torch.Generator
    gradient: LayerGradient | None = None


class Initializer(Protocol):
    """Makes a layer's first A `(rank, in)` and B `(out, rank)`, float32 on the CPU."""

    def __call__(self, layer: InitialLayer, /) -> tuple[torch.Tensor, torch.Tensor]: ...


class Loss(Protocol):
    """One term of the objective: one value per prompt, shape `(prompts,)`, smaller is better."""

    def __call__(self, batch: Batch, /) -> torch.Tensor: ...


@dataclass(frozen=True)
class SolveRequest:
    """What a closed-form loss is given, once for all prompts of a batch.

    batch: the prompts, the target layers, their frozen weights. rank, alpha: ΔW of a layer is `alpha / rank · B @ A`.
    """

    batch: Batch
    rank: int
    alpha: float


class Solver(Protocol):
    """A loss whose best LoRA weights are computed instead of trained (`LossSpec.closed_form`)."""

    def __call__(self, batch: Batch, /) -> torch.Tensor: ...

    def solve(self, request: SolveRequest, /) -> LoraWeights:
        """A `(prompts, rank, in)` and B `(prompts, out, rank)` of any of the target layers.

        Layers it leaves out stay as the initializer made them. Called without gradient.
        """


class OptimizerFactory(Protocol):
    """Makes a torch optimizer over float32 parameters whose `.grad` is filled before each step.

    It may take the keyword `iterations` too: the number of steps that are planned. An optimizer with a
    method `eval()` has it called after the last step (schedule-free ones put the weights to use there).
    """

    def __call__(self, parameters: Iterable[torch.nn.Parameter], /) -> torch.optim.Optimizer: ...


@dataclass(frozen=True)
class SaveRequest:
    """What a saver is given.

    path: write this one file, or fill this empty folder if the spec says `folder`; whoever asked moves it into place
        when all went well.
    weights: `dict[component, dict[layer, {"lora_A": (rank, in), "lora_B": (out, rank)}]]`, on the CPU, in the dtype
        that the file's numbers shall have: float32, float16 or bfloat16.
    rank, alpha: ΔW of a layer is `alpha / rank · B @ A`.
    family: the model family the backend names, such as `sdxl`.
    metadata: strings to store; `lora_forge` holds the run's own record as JSON.
    layout: what user interfaces call the family's layers; None for a family they do not know.
    """

    path: Path
    weights: LoraWeights
    rank: int
    alpha: float
    family: str
    prompt: str
    metadata: Mapping[str, str]
    layout: FileLayout | None = None


@dataclass(frozen=True)
class SaveReport:
    """What a saver may return.

    padded: layers it added as zeros because the format demands them. notes: what else to know of the file, in words.
    """

    padded: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Saver(Protocol):
    """Writes one prompt's LoRA weights to `request.path`."""

    def __call__(self, request: SaveRequest, /) -> SaveReport | None: ...


@dataclass(frozen=True)
class Tokens:
    """Token ids and mask of one encoder: `input_ids`, `attention_mask` `(rows, length)` int64.

    cut: for each row, the text that did not fit and is left out ("" if all of it fits).
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    cut: tuple[str, ...]


@dataclass(frozen=True)
class EncoderOutput:
    """What an encoder makes of its tokens, float32.

    last_hidden_state: `(prompts, length, width)`, after the final LayerNorm.
    penultimate_hidden_state: `(prompts, length, width)`, the input of the last block.
    pooled: `(prompts, projection)`, one vector for the whole text: for CLIP the projected state of the
        end-of-text token (unprojected where the encoder has no projection).
    """

    last_hidden_state: torch.Tensor
    penultimate_hidden_state: torch.Tensor
    pooled: torch.Tensor


@dataclass(frozen=True)
class BackendRequest:
    """What a backend's factory is given.

    source: a Hub id, a diffusers directory, a single-file checkpoint, or a name the backend knows.
    device, dtype: torch's names for where the frozen weights go and what they become.
    pipeline: a model already in memory, to be used in place and left as it was, instead of `source`.
    """

    source: str
    device: str
    dtype: str
    pipeline: Any = None


class Worker(Protocol):
    """Makes the LoRAs of tasks, with a model that it loads once, for the first of them.

    A task is one batch of prompts. Tasks, what `train` gives, and outcomes are the job's own: an executor passes them
    on. Tasks and outcomes can be pickled; what `train` gives cannot, and stays in its process.
    """

    def train(self, task: Any, /) -> Any:
        """Train a task's prompts. One at a time, and always on the same thread."""

    def save(self, trained: Any, /) -> Any:
        """Write what `train` gave; the task's outcome. May run on another thread while `train` has the next task."""

    def close(self) -> None:
        """Let go of the model, on the thread of `train`, once all is saved."""


@dataclass(frozen=True)
class ExecutorRequest:
    """What an executor is given.

    make_worker: makes a worker in the process that calls it; can be pickled. Each process has one worker at most.
    tasks: what is to be done, in any order, each once; one that was lost with its worker may be done again, and gives
        the same files.
    report: to be called, in the process and on any one thread at a time, with the outcome of each task as soon as it
        is there.
    threads: how many CPU threads torch is to use in each worker's process. The worker sees to it; it is said here for
        executors that reserve processors. What is computed depends on it.
    """

    make_worker: Callable[[], Worker]
    tasks: Sequence[Any]
    report: Callable[[Any], None]
    threads: int


class Executor(Protocol):
    """Carries out all tasks of a request, and returns when each has been reported."""

    def __call__(self, request: ExecutorRequest, /) -> None: ...


class Backend(ABC):
    """Knows one model family: names its layers, loads it, tokenizes, encodes, predicts noise, adapts.

    Layer names are canonical: those of published checkpoints (`text_model.encoder.layers.0…`),
    whatever the installed library calls them. Raises ModelError for whatever is wrong with the model.
    """

    family: str
    causal: ClassVar[bool] = False
    """Whether no token of its encoders attends to later ones, so that what follows a text's end may be left out."""
    target_groups: Mapping[str, Callable[[str], bool]]
    """Named choices of layers for new model configs, such as `attention`: a test of a canonical path."""

    @abstractmethod
    def architecture(self) -> dict[str, dict[str, tuple[int, int]]]:
        """`{component: {canonical path: (out, in)}}` of every linear layer, without reading weights."""

    @abstractmethod
    def check_files(self, components: Collection[str]) -> None:
        """Check that the weights of these components are there and whole, without reading them."""

    @abstractmethod
    def load(self, components: Collection[str]) -> None:
        """Load these components, frozen, unless they are loaded already."""

    @abstractmethod
    def adapt(self, layers: Sequence[TargetLayer], rank: int, alpha: float, slot: BankSlot) -> None:
        """Inject bank layers in place of these layers of the loaded components (`lora_forge.bank.inject`)."""

    @abstractmethod
    def release(self) -> None:
        """Take the bank layers out again and leave the components as they were found."""

    @abstractmethod
    def tokenize(self, encoder: str, texts: Sequence[str]) -> Tokens:
        """Tokens of texts, one row each, padded and cut to the encoder's length, on the CPU."""

    @abstractmethod
    def encode(self, encoder: str, tokens: Tokens, *, masked: bool) -> EncoderOutput:
        """Run an encoder; `masked` passes the attention mask, as the pipeline itself does not."""

    @abstractmethod
    def conditioning(self, outputs: Mapping[str, EncoderOutput]) -> dict[str, torch.Tensor]:
        """What the denoiser is conditioned on, by name, each `(prompts, …)`; encoders may be missing."""

    @abstractmethod
    def weight_norm(self, component: str, layer: str) -> float | None:
        """Frobenius norm of a layer's frozen weight; None when its component is not loaded."""

    @abstractmethod
    def usage(self, path: str, prompt: str) -> str:
        """The lines of Python that use a saved LoRA with this base model."""

    def token_texts(self, encoder: str, tokens: Tokens) -> list[list[str]]:
        """Each token as text that people can read, row by row; here, its number."""
        return [[str(token) for token in row] for row in tokens.input_ids.tolist()]

    def weight(self, component: str, layer: str) -> torch.Tensor | None:
        """A layer's frozen weight `(out, in)`, float32, not to be changed; None when its component is not loaded."""
        raise NotImplementedError

    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of one latent, `(channels, height, width)`."""
        raise NotImplementedError

    def predict_noise(
        self, latents: torch.Tensor, timesteps: torch.Tensor, outputs: Mapping[str, EncoderOutput]
    ) -> torch.Tensor:
        """Noise predicted for `latents` `(prompts, *latent_shape)` at `timesteps` `(prompts,)`, float32."""
        raise NotImplementedError

    def alphas_cumprod(self) -> torch.Tensor:
        """ᾱ of each training timestep, `(train_timesteps,)` float32: √ᾱ_t · x + √(1 - ᾱ_t) · noise is a latent at t."""
        raise NotImplementedError

    def cross_attention(
        self, latents: torch.Tensor, timesteps: torch.Tensor, outputs: Mapping[str, EncoderOutput]
    ) -> dict[str, torch.Tensor]:
        """What each place of the denoiser's layers attends to in the text, as it predicts noise for `latents`.

        Per layer, by its path, `(prompts, height, width, tokens)` float32: probabilities, the mean over the layer's
        heads, with gradient; those of one place sum to 1.
        """
        raise NotImplementedError

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures `(prompts, 3, height, width)` float32 in [0, 1] of latents without noise, with gradient to them.

        The VAE is loaded, frozen, when this is first called, and let go by `release`.
        """
        raise NotImplementedError

    def pipeline(self) -> Any:
        """A diffusers pipeline of the whole model, to make images with; nothing else of the backend is in it.

        It is on the CPU, in the request's dtype, and the caller's own. For a model in memory it is that pipeline
        itself, once `release` has taken the bank layers out. Raises NotImplementedError for a family that makes no
        images.
        """
        raise NotImplementedError
