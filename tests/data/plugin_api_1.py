"""A plugin built for version 1 of the plugin API.

This file must never be edited. It stands for all the plugins that are out there: it says what it says
with the fields, hooks and contracts of the day version 1 was fixed, and has to work unchanged for as
long as a release says that it speaks version 1. If a change to lora-forge breaks it, the change is wrong.
"""

__lora_forge_api__ = 1

import enum
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lora_forge import BackendSpec, InitializerSpec, LossSpec, OptimizerSpec, SaverSpec, hookimpl
from lora_forge.bank import BankSlot, inject
from lora_forge.contracts import Backend, BackendRequest, EncoderOutput, SaveReport, SaveRequest, TargetLayer, Tokens

HEARD: list[tuple[str, dict[str, Any]]] = []


class Norm(enum.Enum):
    ONE = "one"
    TWO = "two"


@dataclass(frozen=True)
class PullOptions:
    """One option of each type."""

    scale: float = field(default=1.0, metadata={"help": "factor of the value", "above": 0, "max": 1000})
    power: int = field(default=2, metadata={"help": "of each number", "min": 1})
    pooled: bool = False
    label: str = "pull"
    table: Path = Path("none.txt")
    part: Literal["last", "penultimate"] = "last"
    norm: Norm = Norm.TWO
    limit: float | None = None
    encoders: list[str] = field(default_factory=list)
    pair: tuple[float, float] = (1.0, 1.0)


def needs_of_pull(options: PullOptions) -> Collection[str]:
    return {"text"}


class Pull:
    """A class that is constructed with its options."""

    def __init__(self, options: PullOptions) -> None:
        assert isinstance(options.norm, Norm)
        assert isinstance(options.table, Path)
        self.options = options

    def __call__(self, batch: Any) -> torch.Tensor:
        values = []
        for name, output in batch.adapted().items():
            if self.options.encoders and name not in self.options.encoders:
                continue
            last = self.options.part == "last"
            hidden = output.last_hidden_state if last else output.penultimate_hidden_state
            value = hidden.abs().pow(self.options.power).mean(dim=(1, 2))
            values.append(value + output.pooled.square().mean(dim=1) if self.options.pooled else value)
        return self.options.scale * torch.stack(values).sum(dim=0)


def drift(batch: Any) -> torch.Tensor:
    """A plain function: how near the adapted states stay to the frozen ones."""
    adapted, frozen = batch.adapted(masked=True), batch.frozen(masked=True)
    parts = [(adapted[name].pooled - frozen[name].pooled).square().mean(dim=1) for name in adapted]
    return torch.stack(parts).sum(dim=0)


@dataclass(frozen=True)
class EvenOptions:
    bound: float = field(default=0.05, metadata={"above": 0})


def even(layer: Any, options: EvenOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """A function that takes the keyword `options`."""
    lora_a = torch.rand(layer.rank, layer.in_features, generator=layer.generator) * options.bound
    return lora_a, torch.zeros(layer.out_features, layer.rank)


@dataclass(frozen=True)
class DescentOptions:
    lr: float = 0.1
    momentum: float = field(default=0.0, metadata={"min": 0, "max": 0.99})


def descent(parameters: Iterable[nn.Parameter], options: DescentOptions, iterations: int) -> torch.optim.Optimizer:
    HEARD.append(("iterations", {"iterations": iterations}))
    return torch.optim.SGD(parameters, lr=options.lr, momentum=options.momentum)


class Single(torch.optim.SGD):
    """One instance per prompt; `eval` is called after the last step."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, lr=0.1)

    def eval(self) -> None:
        HEARD.append(("eval", {}))


def single(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return Single(parameters)


def pickled(request: SaveRequest) -> SaveReport:
    content = {"weights": request.weights, "rank": request.rank, "alpha": request.alpha, "prompt": request.prompt}
    torch.save({**content, "family": request.family, "metadata": dict(request.metadata)}, request.path)
    return SaveReport(padded=())


def read_pickled(path: Path) -> Mapping[str, Mapping[str, torch.Tensor]]:
    content = torch.load(path)
    scale = content["alpha"] / content["rank"]
    return {
        component: {layer: scale * pair["lora_B"] @ pair["lora_A"] for layer, pair in layers.items()}
        for component, layers in content["weights"].items()
    }


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 6)
        self.first, self.second, self.projection = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> EncoderOutput:
        shares = (mask / mask.sum(1, keepdim=True).clamp_min(1))[..., None]
        hidden = self.embedding(ids)
        penultimate = self.first(hidden + (hidden * shares).sum(1, keepdim=True))
        last = self.second(torch.tanh(penultimate))
        return EncoderOutput(
            last_hidden_state=last,
            penultimate_hidden_state=penultimate,
            pooled=self.projection((last * shares).sum(1)),
        )


class Smallest(Backend):
    """One encoder of a few linear layers; defines what version 1 asks of a backend, and nothing more."""

    family = "smallest"
    target_groups: Mapping[str, Callable[[str], bool]] = {"all": lambda path: True}

    def __init__(self) -> None:
        self._encoder: nn.Module | None = None
        self._injected: list[Any] = []

    def _new(self) -> Encoder:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Encoder()

    def architecture(self) -> dict[str, dict[str, tuple[int, int]]]:
        linear = ((name, one) for name, one in self._new().named_modules() if isinstance(one, nn.Linear))
        return {"encoder": {name: (one.out_features, one.in_features) for name, one in linear}}

    def check_files(self, components: Collection[str]) -> None:
        pass

    def load(self, components: Collection[str]) -> None:
        if self._encoder is None:
            self._encoder = self._new().requires_grad_(False).eval()

    def adapt(self, layers: Sequence[TargetLayer], rank: int, alpha: float, slot: BankSlot) -> None:
        assert self._encoder is not None
        self._injected.append(inject(self._encoder, {one.name: one.key for one in layers}, rank, alpha, slot))

    def release(self) -> None:
        for one in self._injected:
            one.unload()
        self._injected.clear()

    def tokenize(self, encoder: str, texts: Sequence[str]) -> Tokens:
        rows = [text.encode()[:40] for text in texts]
        ids = torch.tensor([[*row, *[0] * (40 - len(row))] for row in rows])
        return Tokens(input_ids=ids, attention_mask=(ids != 0).long(), cut=tuple("" for _ in texts))

    def encode(self, encoder: str, tokens: Tokens, *, masked: bool) -> EncoderOutput:
        assert self._encoder is not None
        mask = tokens.attention_mask if masked else torch.ones_like(tokens.attention_mask)
        output: EncoderOutput = self._encoder(tokens.input_ids, mask)
        return output

    def conditioning(self, outputs: Mapping[str, EncoderOutput]) -> dict[str, torch.Tensor]:
        return {f"{name} pooled": output.pooled for name, output in outputs.items()}

    def weight_norm(self, component: str, layer: str) -> float | None:
        if self._encoder is None:
            return None
        module: Any = self._encoder.get_submodule(layer)
        return float(getattr(module, "get_base_layer", lambda: module)().weight.norm())

    def usage(self, path: str, prompt: str) -> str:
        return f"smallest.load({path!r})"


def open_smallest(request: BackendRequest) -> Backend:
    assert request.source == "smallest"
    return Smallest()


@hookimpl
def lora_forge_losses() -> Iterator[LossSpec]:
    yield LossSpec(
        name="pull",
        summary="small states",
        factory=f"{__name__}:Pull",
        options=PullOptions,
        needs=needs_of_pull,
        formula="scale · mean(|h|^power)",
        source="ours",
    )
    yield LossSpec(name="drift", summary="near the frozen model", factory=drift, needs={"text"})


@hookimpl
def lora_forge_initializers() -> Iterable[InitializerSpec]:
    return [InitializerSpec(name="even", summary="A even, B zero", factory=f"{__name__}:even", options=EvenOptions)]


@hookimpl
def lora_forge_optimizers() -> Iterator[OptimizerSpec]:
    yield OptimizerSpec(
        name="descent", summary="plain", factory=f"{__name__}:descent", options=DescentOptions, elementwise=True
    )
    yield OptimizerSpec(name="single", summary="one per prompt", factory=single, elementwise=False)


@hookimpl
def lora_forge_savers() -> Iterator[SaverSpec]:
    yield SaverSpec(name="pickled", summary="a torch file", factory=pickled, suffix=".pt", reader=read_pickled)


@hookimpl
def lora_forge_backends() -> Iterator[BackendSpec]:
    yield BackendSpec(
        name="smallest",
        summary="one encoder",
        factory=open_smallest,
        components=("encoder",),
        encoders=("encoder",),
        reaches={"text": ("encoder",)},
        tiny="smallest",
    )


@hookimpl
def lora_forge_run_started(event: Any) -> None:
    run = event.run
    about = {"id": run.id, "batch_id": run.batch_id, "prompt": run.prompt, "model": run.model}
    HEARD.append(
        ("run_started", {**about, "iterations": run.iterations, "seed": run.seed, "rank": event.record["rank"]})
    )


@hookimpl
def lora_forge_step_finished(event: Any) -> None:
    values = {"loss": event.loss, "terms": dict(event.terms), "l2": event.l2, "norms": dict(event.gradient_norms)}
    HEARD.append(("step_finished", {"id": event.run.id, "step": event.step, **values}))


@hookimpl
def lora_forge_run_finished(event: Any) -> None:
    result = event.result
    HEARD.append(("run_finished", {"id": event.run.id, "path": result.path, "loss": result.loss_after}))


@hookimpl
def lora_forge_run_failed(event: Any) -> None:
    HEARD.append(("run_failed", {"id": event.run.id, "error": str(event.error)}))
