"""What theory says of the text losses: gradients by finite differences, bounds, and optima in closed form."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lora_forge
from lora_forge.builtin.losses import lora_forge_losses
from lora_forge.clip_unet.family import Family
from lora_forge.contracts import EncoderOutput, Tokens
from lora_forge.plugins import Plugin, Supplied, build

SPECS = {spec.name: spec for spec in lora_forge_losses()}
OWN = "{prompt}"
LENGTH = 6
Outputs = dict[str, EncoderOutput]


def loss_of(name: str, **options: Any) -> Callable[[Any], torch.Tensor]:
    spec = SPECS[name]
    return build(Supplied(spec, Plugin("given:it", "it", "", "")), spec.options(**options))


class Stub:
    """A batch without a model: `adapted` and `frozen` make encoder outputs, in any dtype, of a text.

    Conditioned like SDXL, on the penultimate states and the pooled vector of the encoder called `second`. Of a text,
    as many tokens are its own as it has words, and a start and an end.
    """

    def __init__(
        self, prompts: int, adapted: Callable[[str], Outputs], frozen: Callable[[str], Outputs] | None = None
    ) -> None:
        self.prompts = prompts
        self._outputs = {True: adapted, False: frozen or adapted}
        self.encoders = tuple(adapted(OWN))

    @property
    def tokens(self) -> dict[str, Tokens]:
        return self.tokenize(OWN)

    def tokenize(self, text: str) -> dict[str, Tokens]:
        own = [min(LENGTH, 2 + len(text.split()) + row) for row in range(self.prompts)]
        mask = torch.tensor([[int(position < count) for position in range(LENGTH)] for count in own])
        return {encoder: Tokens(mask, mask, ("",) * self.prompts) for encoder in self.encoders}

    def adapted(self, *, masked: bool = False) -> Outputs:
        return self._outputs[True](OWN)

    def frozen(self, *, masked: bool = False) -> Outputs:
        return self._outputs[False](OWN)

    def encode(self, text: str, *, adapted: bool, masked: bool = False) -> Outputs:
        return self._outputs[adapted](text)

    def conditioning(self, outputs: Mapping[str, EncoderOutput]) -> dict[str, torch.Tensor]:
        parts = {f"{encoder} penultimate": output.penultimate_hidden_state for encoder, output in outputs.items()}
        return {**parts, **({"second pooled": outputs["second"].pooled} if "second" in outputs else {})}


def random(text: str, *shape: int) -> torch.Tensor:
    """Numbers of a text's own, float64."""
    generator = torch.Generator().manual_seed(sum(text.encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def frozen(text: str, prompts: int = 2) -> Outputs:
    return {
        encoder: EncoderOutput(
            random(f"{encoder} last {text}", prompts, LENGTH, width),
            random(f"{encoder} penultimate {text}", prompts, LENGTH, width),
            random(f"{encoder} pooled {text}", prompts, width),
        )
        for encoder, width in (("first", 3), ("second", 4))
    }


def moved_by(parameters: torch.Tensor) -> Callable[[str], Outputs]:
    """Outputs that depend on all of each prompt's parameters `(prompts, numbers)`, in a way that bends."""

    def adapted(text: str) -> Outputs:
        def move(name: str, state: torch.Tensor) -> torch.Tensor:
            sizes = state.shape[1:]
            way = random(f"{name} {text}", parameters.shape[1], sizes.numel())
            return state + torch.sin(parameters @ way).view(-1, *sizes)

        return {
            encoder: EncoderOutput(
                move(f"{encoder} a", one.last_hidden_state),
                move(f"{encoder} b", one.penultimate_hidden_state),
                move(f"{encoder} c", one.pooled),
            )
            for encoder, one in frozen(text).items()
        }

    return adapted


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("embedding_magnitude", {}),
        ("embedding_magnitude", {"tokens": "content", "layer": "penultimate"}),
        ("conditioning_magnitude", {"anchor": 0.7}),
        ("embed_write", {}),
        ("embed_direction", {"scale": -1.5}),
        ("embed_preserve", {}),
        ("pooled_align", {}),
        ("prompt_contrast", {"temperature": 0.3}),
    ],
)
def test_its_gradient_is_that_of_finite_differences_in_double_precision(name: str, options: dict[str, Any]) -> None:
    loss = loss_of(name, **options)
    at = random(f"parameters {name}", 2, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda parameters: loss(Stub(2, moved_by(parameters), frozen)), at, eps=1e-6)


def gradient(loss: Callable[[Any], torch.Tensor], parameters: torch.Tensor) -> torch.Tensor:
    at = parameters.clone().requires_grad_()
    (result,) = torch.autograd.grad(loss(Stub(2, moved_by(at), frozen)).sum(), at)
    return result


def test_far_from_the_end_of_its_curriculum_embed_direction_pulls_no_harder_for_a_goal_that_is_further_away() -> None:
    at = random("parameters", 2, 5)
    near, far = (loss_of("embed_direction", scale=scale, ahead=0.2) for scale in (50.0, 5000.0))
    assert torch.equal(gradient(near, at), gradient(far, at))
    plain = [gradient(loss_of("embed_direction", scale=scale), at).norm() for scale in (50.0, 5000.0)]
    assert plain[1] > 50 * plain[0]


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(
    ("reached", "goal"), [(-0.3, 0.2), (0.0, 0.2), (0.5, 0.7), (0.95, 1.0), (1.0, 1.0), (1.5, 1.0)]
)
def test_the_goal_of_embed_direction_is_a_fixed_distance_ahead_until_it_stands_at_the_scale(
    sign: float, reached: float, goal: float
) -> None:
    concept, nothing, at = random("c", 2, 1, 4), random("n", 2, 1, 4), random("x", 2, 1, 4)

    def one(state: torch.Tensor) -> Outputs:
        states = state.expand(-1, LENGTH, -1)
        return {"first": EncoderOutput(states, states, states[:, 0])}

    start = {"thick paint": one(concept), "": one(nothing), OWN: one(at)}
    direction = concept - nothing
    moved = (sign * reached * direction).requires_grad_()
    stub = Stub(2, lambda _: one(at + moved), start.__getitem__)
    value = loss_of("embed_direction", concept="thick paint", scale=sign, ahead=0.2)(stub)
    assert value.tolist() == pytest.approx(
        ((goal - reached) ** 2 * direction.square().mean(dim=(1, 2))).tolist(), rel=1e-9, abs=1e-15
    )
    # The goal itself has no gradient: it does not run away from what pulls at it.
    (pull,) = torch.autograd.grad(value.sum(), moved)
    torch.testing.assert_close(
        pull, 2 * sign * (reached - goal) * direction / direction.shape[2], rtol=1e-9, atol=1e-15
    )


def test_where_encoders_read_different_texts_a_position_counts_that_holds_a_token_of_either() -> None:
    class TwoTexts(Stub):
        def tokenize(self, text: str) -> dict[str, Tokens]:
            masks = {"first": [1, 1, 0, 0, 0, 0], "second": [1, 1, 1, 1, 0, 0]}
            rows = {encoder: torch.tensor([mask] * self.prompts) for encoder, mask in masks.items()}
            return {encoder: Tokens(mask, mask, ("",) * self.prompts) for encoder, mask in rows.items()}

    said = frozen(OWN)
    sizes = [one.penultimate_hidden_state[:, :4].abs().mean(dim=(1, 2)) for one in said.values()]
    sizes.append(said["second"].pooled.abs().mean(dim=1))
    value = loss_of("conditioning_magnitude")(TwoTexts(2, frozen))
    torch.testing.assert_close(value, -torch.stack(sizes).mean(dim=0))


@given(seed=st.integers(0, 2**32), size=st.floats(1e-3, 1e3), tokens=st.sampled_from(["all", "content"]))
@settings(deadline=None, max_examples=50)
def test_no_state_takes_embedding_magnitude_beyond_the_bound_of_its_layer_norm(
    seed: int, size: float, tokens: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    width = 7
    norm = torch.nn.LayerNorm(width, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(size * torch.randn(width, generator=generator))
        norm.bias.copy_(size * torch.randn(width, generator=generator))
        last = norm(torch.randn(1, LENGTH, width, generator=generator, dtype=torch.float64) * size)
    (value,) = loss_of("embedding_magnitude", tokens=tokens)(Stub(1, lambda _: {"it": EncoderOutput(last, last, last)}))
    bound = norm.weight.square().mean().sqrt() + norm.bias.abs().mean()
    assert -value <= bound * (1 + 1e-12)


def test_training_gets_near_the_bound_of_embedding_magnitude_and_never_beyond(
    model: str, family: Family, model_folder: Path, tmp_path: Path
) -> None:
    """With a γ and a β of the final LayerNorm that are not 1 and 0."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    bounds = []
    for encoder in family.encoders:
        file = folder / encoder / "model.safetensors"
        weights = load_file(file)
        norm = {kind: f"text_model.final_layer_norm.{kind}" for kind in ("weight", "bias")}
        for kind, name in norm.items():
            noise = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(len(kind)))
            weights[name] = 0.3 * noise + (kind == "weight")
        bounds.append(float(weights[norm["weight"]].square().mean().sqrt() + weights[norm["bias"]].abs().mean()))
        save_file(weights, file, {"format": "pt"})
    adamw = {"name": "adamw", "options": {"lr": 0.05}}
    result = lora_forge.run("an owl", model, base_model=str(folder), iterations=60, optimizer=adamw, l2=0)
    reached = [-step.terms["embedding_magnitude"] for step in result.steps] + [-result.after.loss]
    bound = float(np.mean(bounds))
    assert reached[0] < 0.85 * bound
    assert 0.85 * bound < max(reached) <= bound


def test_for_a_single_linear_layer_the_optimum_of_embed_write_is_the_least_squares_solution() -> None:
    inputs, goals = random("inputs", 1, LENGTH, 4), random("goals", 1, LENGTH, 3)
    weight = random("weight", 3, 4)
    lora_a = random("A", 3, 4).requires_grad_()
    lora_b = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)

    def layer(added: torch.Tensor | int) -> Outputs:
        states = inputs @ (weight + added).T
        return {"it": EncoderOutput(states, states, states[:, 0])}

    goal = {"it": EncoderOutput(goals, goals, goals[:, 0])}
    write = loss_of("embed_write", target="goal")
    optimizer = torch.optim.LBFGS(
        [lora_a, lora_b], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = write(
            Stub(1, lambda _: layer(lora_b @ lora_a), lambda text: goal if text == "goal" else layer(0))
        ).sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    before = float(closure().detach())
    optimizer.step(closure)  # type: ignore[no-untyped-call]
    solution, *_ = np.linalg.lstsq(inputs[0].numpy(), goals[0].numpy(), rcond=None)
    trained = (weight + lora_b @ lora_a).detach().numpy()
    np.testing.assert_allclose(trained, solution.T, rtol=0, atol=1e-6)
    least = np.mean((inputs[0].numpy() @ solution - goals[0].numpy()) ** 2)
    assert before > 2 * least
    assert float(closure().detach()) == pytest.approx(least, rel=1e-9)


def test_prompt_contrast_is_the_logarithm_of_the_number_of_texts_where_it_cannot_tell_them_apart() -> None:
    same = frozen("all alike")
    value = loss_of("prompt_contrast", negative=("a", "b", "c"))(Stub(2, lambda _: same))
    assert value.tolist() == pytest.approx([np.log(4)] * 2, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("embed_write", {"target": OWN}),
        ("embed_preserve", {}),
        ("pooled_align", {"target": OWN}),
        ("embed_direction", {"scale": 0.0}),
    ],
)
def test_where_nothing_is_asked_of_it_a_loss_is_zero_and_has_no_gradient_at_the_start(
    name: str, options: dict[str, Any]
) -> None:
    loss, start = loss_of(name, **options), torch.zeros(2, 5, dtype=torch.float64)
    assert loss(Stub(2, moved_by(start), frozen)).tolist() == pytest.approx([0, 0], abs=1e-12)
    assert float(gradient(loss, start).abs().max()) < 1e-12
