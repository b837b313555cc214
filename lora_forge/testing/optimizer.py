"""Examining an optimizer: on a bank, with gradients that are the same for one prompt whoever is beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lora_forge.bank import Bank
from lora_forge.contracts import TargetLayer
from lora_forge.records import OptimizerSpec
from lora_forge.seeds import generator_for
from lora_forge.testing.compare import FIRST_SEED, SECOND_SEED, TOGETHER, not_finite, relative, same_bits
from lora_forge.testing.examination import Book, Broken, global_seed
from lora_forge.testing.stage import personal_bank, some_layers
from lora_forge.training.optimizers import end_training, make_optimizer, start_optimizers

_STEPS = 8
_ROUNDING = 1e-7  # of the parameters: less than half a unit in the last place of each
_ALONE = "keep no state in the class or module, only in the instance"
_NOT_ELEMENTWISE = (
    "it is declared elementwise=True, but looks at more than one number at a time (a norm, a mean, a block): declare "
    "elementwise=False, and each prompt gets an instance of its own over its own matrices"
)


def examine_optimizer(book: Book, spec: OptimizerSpec, options: Any, make: Callable[[], Callable[..., Any]]) -> None:
    """See `lora_forge.testing.RULES`."""
    exam = _Exam(spec, make)
    with book.rule("optimizer", vital=True):
        exam.start(exam.bank(TOGETHER))
    with book.rule("in_place", vital=True):
        exam.check_in_place()
    with book.rule("finite", vital=True):
        together = exam.train(TOGETHER, FIRST_SEED)
        if how := not_finite(together.parameter.detach()):
            raise Broken(f"after {_STEPS} steps with ordinary gradients the parameters are {how}")
    with book.rule("moves"):
        _check_moved(exam.bank(TOGETHER), together)
    with book.rule("zero_gradient"):
        still = exam.train(TOGETHER, FIRST_SEED, size=0.0)
        if how := not_finite(still.parameter.detach()):
            raise Broken(
                f"after steps with a gradient of zero the parameters are {how}; A has one at the first step, where B "
                "is zero, and layers out of reach always: add a small number to what is divided by"
            )
    with book.rule("deterministic", vital=True):
        exam.check_deterministic(together)
    with book.rule("neighbours", vital=True):
        exam.check_neighbours()
    with book.rule("independent", vital=True):
        exam.check_alone(together)
    if spec.elementwise:
        with book.rule("elementwise"):
            exam.check_flat()


class _Exam:
    def __init__(self, spec: OptimizerSpec, make: Callable[[], Callable[..., Any]]) -> None:
        self.spec, self.make = spec, make
        # An odd size too: where in its tensor a number lies must not matter to its rounding.
        self.layers = [*some_layers(each=2), TargetLayer("text_encoder", "odd", 13, 7)]

    def bank(self, people: Sequence[int]) -> Bank:
        return personal_bank(self.layers, people)

    def start(self, bank: Bank) -> list[torch.optim.Optimizer]:
        """As a run does: one optimizer over the whole bank, or one per prompt over its matrices."""
        return start_optimizers(self.optimizer, bank, elementwise=self.spec.elementwise, iterations=_STEPS)

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        made = make_optimizer(self.make(), parameters, _STEPS)
        if not isinstance(made, torch.optim.Optimizer):
            raise Broken(
                f"its factory gives a {type(made).__name__}; return a torch.optim.Optimizer over the parameters"
            )
        return made

    def train(self, people: Sequence[int], seed: int, *, size: float = 1.0) -> Bank:
        """The bank after some steps, each prompt with gradients of its own."""
        bank = self.bank(people)
        with global_seed(seed):
            optimizers = self.start(bank)
            for step in range(_STEPS):
                bank.zero_gradient()
                bank.gradient.copy_(self.gradients(people, step) * size)
                for optimizer in optimizers:
                    optimizer.step()
            end_training(optimizers)
        return bank

    def gradients(self, people: Sequence[int], step: int) -> torch.Tensor:
        """`(people, numbers)`: mostly one way, as real ones are, and each prompt's of another size."""
        numbers = self.bank([0]).parameter.shape[1]
        drawn = [
            [torch.randn(numbers, generator=generator_for(f"{what} of {one}")) for what in ("way", f"gradient {step}")]
            for one in people
        ]
        rows = [way + 0.5 * noise for way, noise in drawn]
        scales = torch.tensor([10.0 ** (-1 - one % 3) for one in people])
        return torch.stack(rows) * scales[:, None]

    def check_in_place(self) -> None:
        """The bank's memory is what the model computes with; an optimizer has to move that."""
        bank = self.bank([0])
        parameters = [bank.parameter] if self.spec.elementwise else bank.rows(0)
        optimizer = self.optimizer(parameters)
        places = [parameter.data_ptr() for parameter in parameters]
        for step in range(2):
            bank.zero_gradient()
            bank.gradient.copy_(self.gradients([0], step))
            optimizer.step()
        end_training([optimizer])
        if places != [parameter.data_ptr() for parameter in parameters]:
            raise Broken(
                "it puts another tensor in a parameter's place (parameter.data = …), so that the model never sees the "
                "step; change the parameter itself: parameter.data.copy_(…), add_, mul_"
            )

    def check_deterministic(self, first: Bank) -> None:
        for seed, when in ((FIRST_SEED, "run twice"), (SECOND_SEED, "under another global seed (torch.manual_seed)")):
            again = self.train(TOGETHER, seed)
            if not same_bits(first.parameter, again.parameter):
                share = relative(first.parameter, again.parameter)
                raise Broken(
                    f"{when}, the same gradients lead elsewhere, by {share:.2g} of the parameters; draw no random "
                    f"numbers, and {_ALONE}"
                )

    def check_neighbours(self) -> None:
        """One prompt's matrices are views into memory that holds the others' too."""
        bank = self.bank([0, 1])
        optimizer = self.optimizer(bank.rows(0))
        bank.zero_gradient()
        bank.gradient.copy_(self.gradients([0, 1], 0))
        parameter, gradient = bank.parameter.detach()[1].clone(), bank.gradient[1].clone()
        optimizer.step()
        for what, before, after in (
            ("parameters", parameter, bank.parameter.detach()[1]),
            ("gradients", gradient, bank.gradient[1]),
        ):
            if not same_bits(before, after):
                raise Broken(f"given one prompt's matrices, it changes another prompt's {what}; leave memory alone")

    def check_alone(self, together: Bank) -> None:
        for row, person in enumerate(TOGETHER):
            alone = self.train([person], FIRST_SEED)
            if not same_bits(together.parameter[row], alone.parameter[0]):
                share = relative(together.parameter[row], alone.parameter[0])
                why = _NOT_ELEMENTWISE if self.spec.elementwise else _ALONE
                if share < _ROUNDING:
                    why = (
                        "its rounding depends on where in its tensor a number lies, as with fused=True of torch's "
                        "optimizers; foreach=True rounds the same everywhere"
                    )
                raise Broken(
                    f"after {_STEPS} steps beside two others, prompt {row + 1} of 3 is elsewhere than alone, by "
                    f"{share:.2g} of its parameters; {why}"
                )

    def check_flat(self) -> None:
        """One tensor with all numbers against a tensor for each matrix."""
        flat = self.train([0], FIRST_SEED)
        apart = self.bank([0])
        with global_seed(FIRST_SEED):
            optimizer = self.optimizer(apart.rows(0))
            for step in range(_STEPS):
                apart.zero_gradient()
                apart.gradient.copy_(self.gradients([0], step))
                optimizer.step()
            end_training([optimizer])
        if not same_bits(flat.parameter, apart.parameter):
            share = relative(flat.parameter, apart.parameter)
            raise Broken(
                f"after {_STEPS} steps one flat tensor is elsewhere than the same numbers as separate matrices, by "
                f"{share:.2g} of them; {_NOT_ELEMENTWISE}"
            )


def _check_moved(before: Bank, after: Bank) -> None:
    for key, pair in before.pairs.items():
        for name, old, new in zip(pair._fields, pair, after.pairs[key], strict=True):
            for prompt in range(before.prompts):
                if same_bits(old.detach()[prompt], new.detach()[prompt]):
                    raise Broken(
                        f"{name} of {'.'.join(key)} is after {_STEPS} steps where it was, though its gradient is not "
                        "zero; step every parameter it is given, by `.grad`, without a closure"
                    )
