"""Examining a loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_forge.batch import Batch
from lora_forge.errors import LoraForgeError, UndeclaredNeed
from lora_forge.options import options_as_dict
from lora_forge.records import NEEDS, LossSpec
from lora_forge.testing.closed_form import check_closed_form
from lora_forge.testing.compare import (
    FIRST_SEED,
    GRADIENT_TOLERANCE,
    OTHER_MATES,
    SECOND_SEED,
    TOGETHER,
    VALUE_TOLERANCE,
    not_finite,
    relative,
    same_bits,
    shape_of,
)
from lora_forge.testing.examination import Book, Broken, Halt, global_seed, in_words
from lora_forge.testing.stage import ONE_ENCODER, TINY, Stage, WatchedView, personal_bank, tiny_stage
from lora_forge.training.objective import backward
from lora_forge.training.reach import Reach


@dataclass(frozen=True)
class _Evaluation:
    """values `(prompts,)`, gradient `(prompts, numbers)`; layers per component: part of the graph, given a gradient."""

    values: torch.Tensor
    gradient: torch.Tensor
    reached: Counter[str]
    moved: Counter[str]


def examine_loss(book: Book, spec: LossSpec, options: Any, make: Callable[[], Callable[..., Any]]) -> None:
    """See `lora_forge.testing.RULES`."""
    exam = _Exam(book, spec, options, make, tiny_stage())
    together = exam.evaluate(TOGETHER, FIRST_SEED)
    exam.evaluate(TOGETHER, FIRST_SEED, zero_b=True)
    with book.rule("steps", vital=True):
        exam.check_second_step()
    with book.rule("deterministic", vital=True):
        exam.check_deterministic(together)
    with book.rule("independent", vital=True):
        exam.check_alone(together)
        exam.check_other_mates(together)
    with book.rule("tokens"):
        if spec.tokens == "content":
            exam.check_content(together)
    with book.rule("solves"):
        if spec.closed_form:
            check_closed_form(exam.stage, exam.needs, spec.name, make)
    with book.rule("reaches"):
        exam.check_reached(together)
    with book.rule("undeclared", vital=True):
        exam.check_undeclared(together)
    with book.rule("families"):
        exam.check_other_family()


class _Batch(Batch):
    """A loss's window on a view, which remembers what was asked for last."""

    asked = ""

    def _require(self, need: str) -> None:
        self.asked = need
        super()._require(need)


class _Exam:
    def __init__(
        self, book: Book, spec: LossSpec, options: Any, make: Callable[[], Callable[..., Any]], stage: Stage
    ) -> None:
        self.book, self.spec, self.options, self.make, self.stage = book, spec, options, make, stage
        with book.rule("needs", vital=True):
            self.needs = self._needs()

    def _needs(self) -> frozenset[str]:
        try:
            needs = self.spec.needs_for(self.options)
        except Exception as error:
            raise Broken(f"its `needs` cannot be told from its options: {type(error).__name__}: {error}") from error
        if unknown := sorted(map(str, needs - set(NEEDS))):
            raise Broken(f"{', '.join(unknown)}: no such need; there are {', '.join(NEEDS)}")
        if unserved := sorted(needs - set(self.stage.spec.reaches)):
            served = ", ".join(self.stage.spec.reaches)
            raise Broken(f"it needs {', '.join(unserved)}, which {TINY} cannot serve; it serves {served}")
        return needs

    def evaluate(
        self, people: Sequence[int], seed: int, *, zero_b: bool = False, content_only: bool = False
    ) -> _Evaluation:
        """Value and gradient for these people by a loss made anew, checked for what must hold every time."""
        bank = personal_bank(self.stage.layers, people, zero_b=zero_b)
        before, told = bank.parameter.detach().clone(), options_as_dict(self.options)
        view, reach = self.stage.view(people), Reach(bank)
        view.content_only = content_only
        self.stage.slot.bank = bank
        try:
            with global_seed(seed):
                value = self._value(self.make(), view)
                with self.book.rule("immutable", vital=True):
                    self._check_immutable(view, same_bits(bank.parameter, before), told)
                with self.book.rule("shape", vital=True):
                    self._check_shape(value, people)
                with self.book.rule("finite", vital=True):
                    _check_finite("value", value, zero_b)
                with self.book.rule("differentiable", vital=True):
                    _check_graph(value)
                with self.book.rule("differentiable", vital=True):
                    backward(value)
                with self.book.rule("finite", vital=True):
                    _check_finite("gradient", bank.gradient, zero_b)
        finally:
            self.stage.slot.bank = None
        reached = Counter(component for component, _ in reach.reached)
        moved = Counter(key[0] for key in reach.reached if bool(_gradient(bank.pairs[key].lora_B).any()))
        return _Evaluation(value.detach().clone(), bank.gradient.clone(), reached, moved)

    def _value(self, loss: Callable[..., Any], view: WatchedView) -> Any:
        view.begin_step()
        batch = _Batch(view, self.needs, self.spec.name)
        with self.book.rule("needs", vital=True):
            try:
                return loss(batch)
            except UndeclaredNeed as error:
                raise Broken(
                    f"it asks for {batch.asked!r}, which its record does not declare; "
                    f"declare needs={_set(self.needs | {batch.asked})}"
                ) from error
        raise Halt

    def _check_immutable(self, view: WatchedView, same_weights: bool, told: dict[str, Any]) -> None:
        changed = view.changed()
        if not same_weights:
            changed.append("the LoRA weights")
        if options_as_dict(self.options) != told:
            changed.append("its own options")
        if changed:
            raise Broken(
                f"it changes {', '.join(changed)}; other terms of the objective, and its own next step, see the same "
                "ones: compute new tensors (no mul_, no x[...] = …)"
            )

    def _check_shape(self, value: Any, people: Sequence[int]) -> None:
        expected = (len(people),)
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != expected:
            count = "3 prompts" if len(people) > 1 else "1 prompt alone"
            hint = "average over all dimensions but the first, as .flatten(1).mean(1) does"
            if isinstance(value, torch.Tensor) and value.ndim == 0:
                hint = "one number for all is no loss of each: " + hint
            raise Broken(f"for {count} it returns {shape_of(value)}, not one value per prompt, {expected}; {hint}")

    def check_reached(self, evaluation: _Evaluation) -> None:
        """Of the components that only one of the declared needs brings in, one at least has to get a gradient."""
        for need in sorted(self.needs):
            others = {c for other in self.needs - {need} for c in self.stage.spec.reaches[other]}
            brought = [c for c in self.stage.spec.reaches[need] if c not in others]
            if not brought or any(evaluation.moved[component] for component in brought):
                continue
            how = "a gradient of zero" if any(evaluation.reached[c] for c in brought) else "no gradient"
            raise Broken(
                f"it declares the need {need!r}, but {how} reaches {', '.join(brought)}, which that brings in: "
                "nothing there would be trained. Declare only what is used; .detach() and frozen() cut a gradient off"
            )

    def check_undeclared(self, evaluation: _Evaluation) -> None:
        declared = {component for need in self.needs for component in self.stage.spec.reaches[need]}
        for component, count in evaluation.reached.items():
            if component not in declared:
                served = [need for need, reached in self.stage.spec.reaches.items() if component in reached]
                raise Broken(
                    f"the gradient reaches {count} layers of {component}, which needs={_set(self.needs)} does not "
                    f"declare: a run would not have loaded it. Ask the batch alone for outputs, and declare "
                    f"{' or '.join(map(repr, served))} for it"
                )

    def check_other_family(self) -> None:
        """One value per prompt on a family of one encoder too, or an error that says what is lacking."""
        stage = tiny_stage(ONE_ENCODER, self.needs)
        stage.slot.bank = personal_bank(stage.layers, TOGETHER)
        view = stage.view(TOGETHER)
        view.begin_step()
        where = f"on {stage.spec.tiny}, whose one text encoder is {stage.spec.encoders[0]!r},"
        try:
            value = self.make()(Batch(view, self.needs, self.spec.name))
        except UndeclaredNeed as error:
            raise Broken(f"{where} it asks for what its record does not declare: {error}") from error
        except LoraForgeError:
            return
        except (Exception, SystemExit) as error:
            raise Broken(
                f"{where} it raises {in_words(error)}: take the encoders as they come (batch.encoders, "
                "batch.adapted().items(), batch.conditioning(…)), or raise lora_forge.errors.ObjectiveError saying "
                "what it lacks"
            ) from error
        finally:
            stage.slot.bank = None
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != (len(TOGETHER),):
            raise Broken(f"{where} it returns {shape_of(value)}, not one value per prompt, {(len(TOGETHER),)}")
        if how := not_finite(value.detach()):
            raise Broken(f"{where} its value is {how}")
        if not value.requires_grad:
            raise Broken(f"{where} its value has no gradient, so nothing would be trained")

    def check_second_step(self) -> None:
        """One loss object, as in a run, asked twice, the weights having moved in between."""
        bank = personal_bank(self.stage.layers, TOGETHER)
        view, loss = self.stage.view(TOGETHER), self.make()
        self.stage.slot.bank = bank
        try:
            for step in (1, 2):
                bank.zero_gradient()
                value = self._value(loss, view)
                if not isinstance(value, torch.Tensor) or not value.requires_grad:
                    raise Broken(f"at step {step} its value has no gradient")
                try:
                    backward(value)
                except RuntimeError as error:
                    raise Broken(
                        f"at step {step} the gradient cannot be computed: {_first_sentence(error)}. Keep no "
                        "adapted output from one step to the next, or .detach() it"
                    ) from error
        finally:
            self.stage.slot.bank = None

    def check_deterministic(self, first: _Evaluation) -> None:
        for seed, when in ((FIRST_SEED, "run twice"), (SECOND_SEED, "under another global seed (torch.manual_seed)")):
            again = self.evaluate(TOGETHER, seed)
            hint = "it must depend on the prompt's own seed alone: take noise from batch.randn(name, *shape)"
            if not same_bits(first.values, again.values):
                was, now = first.values.tolist()[0], again.values.tolist()[0]
                raise Broken(f"{when}, it gives another value for the same prompt, {was:.9g} and {now:.9g}; {hint}")
            if not same_bits(first.gradient, again.gradient):
                share = relative(first.gradient, again.gradient)
                raise Broken(f"{when}, it gives another gradient for the same prompt, by {share:.2g} of it; {hint}")

    def check_alone(self, together: _Evaluation) -> None:
        largest = float(together.values.abs().max())
        for row, person in enumerate(TOGETHER):
            alone = self.evaluate([person], FIRST_SEED)
            beside, own = float(together.values[row]), float(alone.values[0])
            if abs(beside - own) > VALUE_TOLERANCE * max(largest, abs(own)):
                raise Broken(
                    f"prompt {row + 1} of 3 has the value {beside:.6g} beside the others and {own:.6g} alone; "
                    "keep the first dimension (prompts) apart: no mean, norm, sorting or noise over it"
                )
            if (share := relative(together.gradient[row], alone.gradient[0])) > GRADIENT_TOLERANCE:
                raise Broken(
                    f"the gradient of prompt {row + 1} of 3 differs by {share:.2g} of it between beside the others and "
                    "alone, though the value does not; keep the first dimension (prompts) apart"
                )

    def check_other_mates(self, together: _Evaluation) -> None:
        others = self.evaluate(OTHER_MATES, FIRST_SEED)
        for what, one, other in (
            ("value", together.values[0], others.values[0]),
            ("gradient", together.gradient[0], others.gradient[0]),
        ):
            if not same_bits(one, other):
                raise Broken(
                    f"the {what} of prompt 1 of 3 changes by {relative(one, other):.2g} of it when the two prompts "
                    "beside it are others; keep the first dimension (prompts) apart"
                )

    def check_content(self, whole: _Evaluation) -> None:
        cut = self.evaluate(TOGETHER, FIRST_SEED, content_only=True)
        far = float((whole.values - cut.values).abs().max()) > VALUE_TOLERANCE * float(whole.values.abs().max())
        if far or relative(whole.gradient, cut.gradient) > GRADIENT_TOLERANCE:
            raise Broken(
                "declared to read the content's tokens alone, it gives another value or gradient where nothing follows "
                "the longest text: weight positions by batch.tokens[…].attention_mask, or leave out tokens='content'"
            )


def _check_finite(what: str, tensor: torch.Tensor, zero_b: bool) -> None:
    if how := not_finite(tensor.detach()):
        when = (
            " at the start of a run, where B is zero and the adapted model is the frozen one (the square root of zero "
            "has no gradient, 0 / 0 no value: add a small number under the root or to the denominator)"
            if zero_b
            else "; mind logarithms, roots and quotients of what can be zero"
        )
        raise Broken(f"its {what} is {how}{when}")


def _check_graph(value: torch.Tensor) -> None:
    if not value.requires_grad:
        raise Broken(
            "its value has no gradient, so nothing would be trained: compute it from batch.adapted(), or encode or "
            "predict_noise with adapted=True, without .detach(), .item(), .numpy(), torch.no_grad() or rounding"
        )


def _gradient(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad


def _set(needs: frozenset[str]) -> str:
    return "{" + ", ".join(map(repr, sorted(needs))) + "}"


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).split(". ")[0].rstrip(".")
