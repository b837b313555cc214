"""Whatever a plugin does wrong while a run goes on is one error that names it, and leaves no file."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import target_layers

import lora_forge
from lora_forge.errors import PluginError, RunFailed

FAULTS = """
import torch
from lora_forge import BackendSpec, InitializerSpec, LossSpec, OptimizerSpec, SaverSpec, hookimpl


class Backwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ValueError("no way back")


def mean(batch):
    return sum(out.last_hidden_state.mean((1, 2)) for out in batch.adapted().values())

def one_way(batch):
    return Backwards.apply(mean(batch))

def leaves(batch):
    raise SystemExit(7)

def noisy(batch):
    return mean(batch) * batch.randn("scale")

def noise(batch):
    return torch.randn(batch.prompts, *batch.latent_shape)

def blurred(batch):
    steps = torch.full((batch.prompts,), 500)
    return batch.predict_noise(noise(batch)[..., 0], steps, batch.adapted(), adapted=True).mean((1, 2, 3))

def deaf(batch):
    steps = torch.full((batch.prompts,), 500)
    return batch.predict_noise(noise(batch), steps, {}, adapted=True).mean((1, 2, 3))

def late(batch):
    noise = batch.randn("noise", *batch.latent_shape)
    steps = torch.full((batch.prompts,), 500)
    predicted = batch.predict_noise(noise, steps, batch.adapted(), adapted=True)
    return Backwards.apply(predicted.square().mean((1, 2, 3)))

def thin(layer):
    return torch.zeros(1, layer.in_features), torch.zeros(layer.out_features, layer.rank)

def holes(layer):
    lora_a = torch.full((layer.rank, layer.in_features), float("nan"))
    return lora_a, torch.zeros(layer.out_features, layer.rank)

def full(layer):
    shape = layer.out_features, layer.rank
    return torch.ones(layer.rank, layer.in_features), 0.001 * torch.ones(shape)

class Tidy(torch.optim.SGD):
    def step(self):
        super().step()
        self.zero_grad()

def tidy(parameters):
    return Tidy(parameters, lr=0.1)

class Stuck(torch.optim.SGD):
    def step(self):
        raise RuntimeError("stuck")

def stuck(parameters):
    return Stuck(parameters, lr=0.1)

def unwilling(parameters):
    raise RuntimeError("unwilling")

def silent(request):
    pass

@hookimpl
def lora_forge_losses():
    for loss in (one_way, leaves, noisy):
        yield LossSpec(name=loss.__name__, summary="", needs={"text"}, factory=loss)
    for loss in (blurred, deaf, late):
        yield LossSpec(name=loss.__name__, summary="", needs={"text", "noise_prediction"}, factory=loss)

@hookimpl
def lora_forge_initializers():
    for initializer in (thin, holes, full):
        yield InitializerSpec(name=initializer.__name__, summary="", factory=initializer)

@hookimpl
def lora_forge_optimizers():
    for optimizer in (tidy, stuck, unwilling):
        yield OptimizerSpec(name=optimizer.__name__, summary="", factory=optimizer)

@hookimpl
def lora_forge_savers():
    yield SaverSpec(name="silent", summary="", factory=silent)
    yield SaverSpec(name="nowhere", summary="", factory="no_such_module:saver")
"""


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugins") / "faults.py"
    path.write_text(FAULTS)
    return path


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss": "one_way"}, "no way back"),
        ({"loss": "leaves"}, "loss 'leaves' failed: SystemExit: 7"),
        ({"loss": "blurred"}, "loss 'blurred' failed: "),
        ({"loss": "deaf"}, "loss 'deaf' failed: KeyError: 'text_encoder"),
        ({"loss": "late"}, "no way back"),
        (
            {"initializer": "thin"},
            r"initializer 'thin' failed: ValueError: lora_A of text_encoder\..* has shape \(1, \d+\), expected \(4, ",
        ),
        ({"initializer": "holes"}, "initializer 'holes' failed: ValueError: .* is not finite"),
        ({"optimizer": "stuck"}, "optimizer 'stuck' failed: RuntimeError: stuck"),
        ({"optimizer": "unwilling"}, "optimizer 'unwilling' failed: RuntimeError: unwilling"),
        ({"saver": "silent"}, "saver 'silent' wrote nothing"),
    ],
)
def test_a_fault_is_a_failed_run_that_names_it(
    model: str, faults: Path, tmp_path: Path, settings: dict[str, str], words: str
) -> None:
    with pytest.raises(RunFailed, match=words):
        lora_forge.run("owl", model, iterations=2, plugins=[faults], output=tmp_path / "o.safetensors", **settings)
    assert list(tmp_path.iterdir()) == []


def test_a_saver_that_cannot_be_built_is_known_before_the_first_step(faults: Path, tmp_path: Path) -> None:
    plugin = tmp_path / "watch.py"
    plugin.write_text(
        "from lora_forge import hookimpl\n@hookimpl\n"
        "def lora_forge_step_finished(event):\n    raise KeyboardInterrupt('a step was taken')\n"
    )
    with pytest.raises(PluginError, match="saver 'faults:nowhere' cannot be built"):
        lora_forge.run("owl", "tiny_sdxl", iterations=2, plugins=[faults, plugin], saver="nowhere")


def test_an_optimizer_that_takes_the_gradient_away_still_steps_every_time(model: str, faults: Path) -> None:
    result = lora_forge.run("owl", model, iterations=4, plugins=[faults], optimizer="tidy")
    losses = [step.loss for step in result.steps]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 4


def test_noise_of_a_loss_is_the_seeds_own_and_the_same_before_and_after(model: str, faults: Path) -> None:
    settings = {"plugins": [faults], "loss": "noisy"}
    one = lora_forge.run("owl", model, iterations=3, **settings)
    again = lora_forge.run("owl", model, iterations=3, **settings)
    other = lora_forge.run("owl", model, iterations=3, seed=1, **settings)
    assert one.steps == again.steps
    assert one.steps[0].terms != other.steps[0].terms
    still = lora_forge.run("owl", model, iterations=1, optimizer={"options": {"lr": 1e-12}}, **settings)
    assert still.after.terms["noisy"] == pytest.approx(still.before.terms["noisy"], rel=1e-4)


def test_inert_layers_that_carry_a_change_are_said_to_and_stay_in_the_file(model: str, faults: Path) -> None:
    result = lora_forge.run("owl", model, iterations=1, plugins=[faults], initializer="full", inert="drop")
    unet = len(target_layers(model)["unet"])
    assert len(result.inert) == unet
    assert result.dropped == ()
    assert any(f"{unet} of them carry a change they started with" in warning for warning in result.warnings)
