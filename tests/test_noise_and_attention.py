"""What a loss sees through the denoiser: the noise schedule, cross-attention, the LoRA at the scale -1."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from denoiser_scene import Scene, look, open_backend, scene_of
from diffusers_reader import open_pipeline

import lora_forge
from lora_forge.batch import Batch
from lora_forge.clip_unet.family import Family
from lora_forge.contracts import Backend
from lora_forge.errors import ModelError, ObjectiveError, UndeclaredNeed

NOISE_LOSS = """
import torch
from lora_forge import LossSpec, hookimpl

def noise(batch):
    latents = batch.randn("latents", *batch.latent_shape)
    timesteps = torch.full((batch.prompts,), 500)
    return batch.predict_noise(latents, timesteps, batch.adapted(), adapted=True).square().mean((1, 2, 3))

def text(batch):
    return sum(out.last_hidden_state.square().mean((1, 2)) for out in batch.adapted().values())

@hookimpl
def lora_forge_losses():
    yield LossSpec(name="noise", summary="", needs={"text", "noise_prediction"}, factory=noise)
    yield LossSpec(name="text", summary="", factory=text)
"""


@pytest.fixture
def scene(model: str) -> Scene:
    return scene_of(model)


@pytest.fixture(scope="module")
def pipe(family: Family, model_folder: Path) -> Any:
    return open_pipeline(family.name, model_folder)


def changed_folder(folder: Path, to: Path, **changes: Any) -> str:
    """The model with another scheduler's config; None takes a key away, and no change at all the file."""
    shutil.copytree(folder, to)
    path = to / "scheduler" / "scheduler_config.json"
    if not changes:
        path.unlink()
        return str(to)
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return str(to)


# The schedule


def test_the_schedule_is_that_of_the_models_scheduler(model: str, model_folder: Path, tmp_path: Path) -> None:
    def by_hand(start: float, end: float, steps: int) -> list[float]:
        share, shares = 1.0, []
        for step in range(steps):
            share *= 1 - (start**0.5 + (end**0.5 - start**0.5) * step / (steps - 1)) ** 2
            shares.append(share)
        return shares

    for source, expected in (
        (str(model_folder), by_hand(0.00085, 0.012, 1000)),
        (changed_folder(model_folder, tmp_path / "none"), by_hand(0.00085, 0.012, 1000)),
        (
            changed_folder(model_folder, tmp_path / "other", beta_end=0.02, num_train_timesteps=50),
            by_hand(0.00085, 0.02, 50),
        ),
    ):
        alphas = open_backend(model, source=source).alphas_cumprod()
        assert alphas.dtype == torch.float32
        torch.testing.assert_close(alphas, torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_a_pipeline_in_memory_has_its_own_schedule(model: str, family: Family, model_folder: Path) -> None:
    pipe = open_pipeline(family.name, model_folder)
    pipe.scheduler = type(pipe.scheduler).from_config({**pipe.scheduler.config, "num_train_timesteps": 60})
    assert len(open_backend(model, pipeline=pipe).alphas_cumprod()) == 60


def test_a_config_without_a_schedule_is_an_error_that_names_the_model(
    model: str, model_folder: Path, tmp_path: Path
) -> None:
    source = changed_folder(model_folder, tmp_path / "spiral", beta_schedule="spiral")
    with pytest.raises(ModelError, match=r"base model 'spiral'.*no noise schedule: spiral"):
        open_backend(model, source=source).alphas_cumprod()
    source = changed_folder(model_folder, tmp_path / "flow", beta_schedule=None)
    with pytest.raises(ModelError, match="neither beta_schedule nor trained_betas"):
        open_backend(model, source=source).alphas_cumprod()


def test_a_model_that_predicts_something_else_than_noise_serves_losses_on_the_text_alone(
    model: str, model_folder: Path, tmp_path: Path
) -> None:
    source = changed_folder(model_folder, tmp_path / "velocity", prediction_type="v_prediction")
    path = tmp_path / "losses.py"
    path.write_text(NOISE_LOSS)
    settings: dict[str, Any] = {"model": model, "base_model": source, "iterations": 1, "plugins": [path]}
    with pytest.raises(ModelError, match=r"base model 'velocity': its UNet predicts 'v_prediction', not the noise"):
        lora_forge.run("an owl", loss="noise", **settings)
    assert lora_forge.run("an owl", loss="text", **settings).loss_before > 0


def test_a_family_without_a_schedule_is_named_by_a_loss_that_asks_for_one(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(scene.backend), "alphas_cumprod", Backend.alphas_cumprod)
    with pytest.raises(ObjectiveError, match=r"loss 'a_loss' needs the model's noise schedule, which the backend of s"):
        _ = scene.batch().alphas_cumprod


# Cross-attention


class KeepsScores:
    """diffusers' own plain attention, which keeps what it computes."""

    def __init__(self, kept: dict[str, torch.Tensor], path: str) -> None:
        self.kept, self.path = kept, path

    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, **_: Any) -> torch.Tensor:
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            attn.head_to_batch_dim(x) for x in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))
        )
        scores = attn.get_attention_scores(query, key, None)
        if encoder_hidden_states is not None:
            self.kept[self.path] = scores
        result: torch.Tensor = attn.to_out[0](attn.batch_to_head_dim(torch.bmm(scores, value)))
        return result


@contextmanager
def folded_in(scene: Scene, unet: Any) -> Iterator[None]:
    """The first prompt's ΔW in the weights of a plain UNet."""
    weights = dict(unet.named_parameters())
    for sign in (1, -1):
        for (component, layer), (a, b) in scene.bank.pairs.items():
            if component == "unet":
                weights[f"{layer}.weight"].data += sign * scene.bank.scale * (b[0] @ a[0]).detach()
        if sign == 1:
            yield


@pytest.mark.parametrize("adapted", [False, True])
def test_cross_attention_is_what_diffusers_computes_on_the_same_weights(
    scene: Scene, model: str, pipe: Any, adapted: bool
) -> None:
    batch = scene.batch()
    latents, timesteps = look(batch)
    outputs = batch.adapted() if adapted else batch.frozen()
    maps = batch.cross_attention(latents, timesteps, outputs, adapted=adapted)
    kept: dict[str, torch.Tensor] = {}
    pipe.unet.set_attn_processor({path: KeepsScores(kept, path) for path in pipe.unet.attn_processors})
    first = {encoder: type(one)(*(part[:1] for part in vars(one).values())) for encoder, one in outputs.items()}
    with folded_in(scene, pipe.unet) if adapted else torch.no_grad(), torch.no_grad():
        pipe.unet(latents[:1], timesteps[:1], **scene.backend.unet_arguments(latents[:1], first))
    assert len(maps) == len(kept) > 10
    for path, scores in kept.items():
        one = maps[path.removesuffix(".processor")][0].detach()
        side = int(scores.shape[1] ** 0.5)
        assert one.shape == (side, side, 77)
        torch.testing.assert_close(one.flatten(0, 1), scores.mean(dim=0), rtol=2e-3, atol=1e-5)


def test_looking_at_attention_leaves_the_denoiser_as_it_was(scene: Scene) -> None:
    batch = scene.batch()
    latents, timesteps = look(batch)
    unet = scene.backend._modules["unet"]
    before = batch.predict_noise(latents, timesteps, batch.adapted(), adapted=True)
    hooks = {name: len(module._forward_hooks) for name, module in unet.named_modules()}
    processors = dict(unet.attn_processors)
    maps = batch.cross_attention(latents, timesteps, batch.adapted(), adapted=True)
    assert all(one.requires_grad for one in maps.values())
    frozen = batch.cross_attention(latents, timesteps, batch.frozen(), adapted=False)
    assert not any(one.requires_grad for one in frozen.values())
    with pytest.raises(KeyError):
        batch.cross_attention(latents, timesteps, {}, adapted=True)
    assert {name: len(module._forward_hooks) for name, module in unet.named_modules()} == hooks
    assert unet.attn_processors == processors
    assert torch.equal(batch.predict_noise(latents, timesteps, batch.adapted(), adapted=True), before)


def test_attention_of_an_oblong_latent_keeps_its_sides(scene: Scene) -> None:
    batch = scene.batch()
    channels, height, width = batch.latent_shape
    latents = batch.randn("latents", channels, height, 2 * width)
    maps = batch.cross_attention(latents, torch.tensor([900, 40]), batch.frozen(), adapted=False)
    assert {one.shape[2] / one.shape[1] for one in maps.values()} == {2}


def test_in_half_precision_attention_is_float32_all_the_same(model: str) -> None:
    batch = Scene(model, dtype="bfloat16").batch()
    latents, timesteps = look(batch)
    maps = batch.cross_attention(latents, timesteps, batch.adapted(), adapted=True)
    for one in maps.values():
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.sum(-1), torch.ones(one.shape[:3]))


# Recomputing activations


def seen(scene: Scene) -> dict[str, torch.Tensor]:
    """Values that go through the denoiser in every way there is."""
    batch = scene.batch()
    latents, timesteps = look(batch)
    noise = batch.predict_noise(latents, timesteps, batch.adapted(), adapted=True)
    maps = batch.cross_attention(latents, timesteps, batch.adapted(), adapted=True)
    with batch.negated():
        opposite = batch.predict_noise(latents, timesteps, batch.adapted(), adapted=True)
    return {
        "noise": noise.square().flatten(1).mean(1),
        "attention": sum((one.amax((1, 2)).sum(1) for one in maps.values()), torch.zeros(())),
        "pictures": batch.decode(noise)[:, :, ::7].flatten(1).mean(1),
        "negated": (opposite - 1).square().flatten(1).mean(1),
    }


def test_recomputed_activations_give_the_same_values_and_gradients(scene: Scene, model: str) -> None:
    saving = Scene(model, gradient_checkpointing=True)
    plain, recomputed = seen(scene), seen(saving)
    assert saving.backend._modules["unet"].is_gradient_checkpointing
    assert not scene.backend._modules["unet"].is_gradient_checkpointing
    for what, value in plain.items():
        assert torch.equal(value, recomputed[what]), what
        one, other = scene.gradient(value), saving.gradient(recomputed[what])
        assert one.any()
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7 * float(one.abs().max()), msg=what)
    assert saving.bank.scale == scene.bank.scale > 0


def test_recomputed_activations_are_not_kept(scene: Scene, model: str) -> None:
    def kept(scene: Scene) -> int:
        storages: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        batch = scene.batch()
        latents, timesteps = look(batch)
        outputs = batch.adapted()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            noise = batch.predict_noise(latents, timesteps, outputs, adapted=True)
        assert noise.requires_grad
        return sum(storages.values())

    assert kept(Scene(model, gradient_checkpointing=True)) < 0.6 * kept(scene)


@pytest.mark.parametrize("was_on", [False, True])
def test_a_pipeline_in_memory_recomputes_afterwards_what_it_did_before(
    family: Family, model: str, model_folder: Path, was_on: bool
) -> None:
    pipe = open_pipeline(family.name, model_folder)
    if was_on:
        pipe.unet.enable_gradient_checkpointing()
    scene = Scene(model, pipeline=pipe, gradient_checkpointing=not was_on)
    assert pipe.unet.is_gradient_checkpointing
    assert scene.gradient(seen(scene)["attention"]).any()
    scene.backend.release()
    assert pipe.unet.is_gradient_checkpointing == was_on


# The LoRA at the scale -1


def test_a_negated_lora_is_the_one_whose_b_is_negated(scene: Scene) -> None:
    batch = scene.batch()
    latents, timesteps = look(batch)
    own = batch.adapted()
    with batch.negated():
        opposite = batch.predict_noise(latents, timesteps, batch.adapted(), adapted=True)
        frozen = batch.predict_noise(latents, timesteps, batch.frozen(), adapted=False)
    assert batch.adapted() is own, "computed again, or taken from the negated one"
    gradient = scene.gradient((opposite - 1).square().flatten(1).mean(1))
    mirrored = Scene.__new__(Scene)
    mirrored.__dict__.update(scene.__dict__)
    with torch.no_grad():
        for pair in scene.bank.pairs.values():
            pair.lora_B.neg_()
    try:
        batch = mirrored.batch()
        expected = batch.predict_noise(latents, timesteps, batch.adapted(), adapted=True)
        torch.testing.assert_close(opposite, expected)
        assert torch.equal(frozen, batch.predict_noise(latents, timesteps, batch.frozen(), adapted=False))
        expected_gradient = scene.gradient((expected - 1).square().flatten(1).mean(1))
    finally:
        with torch.no_grad():
            for pair in scene.bank.pairs.values():
                pair.lora_B.neg_()
    # Of B the gradient changes its sign with B; of A it is the same.
    start = 0
    for a, b in scene.bank.pairs.values():
        for sign, part in ((1, a), (-1, b)):
            stop = start + part[0].numel()
            one, other = gradient[:, start:stop], sign * expected_gradient[:, start:stop]
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
            start = stop


def test_an_error_while_negated_leaves_the_scale_as_it_was(scene: Scene) -> None:
    batch, scale = scene.batch(), scene.bank.scale
    with pytest.raises(ZeroDivisionError), batch.negated():
        _ = 1 / 0
    assert scene.bank.scale == scale


# Several predictions at once


@pytest.mark.parametrize("adapted", [False, True])
def test_several_predictions_for_each_prompt_in_one_call_are_those_of_as_many_calls(
    scene: Scene, adapted: bool
) -> None:
    batch = scene.batch()
    latents, timesteps = look(batch)
    texts = [batch.encode(text, adapted=adapted) for text in ("", "a fox", "{prompt}, at night")]
    apart = [batch.predict_noise(latents, timesteps, text, adapted=adapted) for text in texts]
    together = {
        encoder: type(one)(
            *(torch.stack([vars(text[encoder])[part] for text in texts], 1).flatten(0, 1) for part in vars(one))
        )
        for encoder, one in texts[0].items()
    }
    noise = batch.predict_noise(
        latents.repeat_interleave(3, 0), timesteps.repeat_interleave(3, 0), together, adapted=adapted
    )
    for number, expected in enumerate(apart):
        torch.testing.assert_close(noise[number::3], expected, rtol=1e-4, atol=1e-5)


# Needs


@pytest.mark.parametrize(
    ("need", "ask"),
    [
        ("noise_prediction", lambda batch: batch.alphas_cumprod),
        ("attention", lambda batch: batch.cross_attention(None, None, {}, adapted=True)),
        ("vae", lambda batch: batch.decode(None)),
    ],
)
def test_what_a_loss_does_not_declare_it_is_not_given(scene: Scene, need: str, ask: Callable[[Batch], Any]) -> None:
    with pytest.raises(UndeclaredNeed, match=f"'a_loss' asks for '{need}'"):
        ask(scene.batch("text"))
