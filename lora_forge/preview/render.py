"""Images without and with a LoRA from the same noise, and how far each differs from the one without.

The LoRA goes in as users put it in: diffusers' `load_lora_weights` and `set_adapters`. Each image has a generator of
its own, seeded by its seed alone, and is made alone; so none depends on the others.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_forge.effect.of_file import Prompt
from lora_forge.errors import LoraFileError, ModelError
from lora_forge.preview.adapter import ADAPTER, check_bare, lora_in

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL.Image import Image

STEPS = 20
Size = tuple[int, int]  # width, height in pixels


@dataclass(frozen=True)
class Picture:
    """One image. difference: mean |with − without| over all pixels and colours, in percent of the range; 0 without."""

    prompt: Prompt
    seed: int
    strength: float
    image: Image
    difference: float


@dataclass(frozen=True)
class Difference:
    """The mean difference at one strength, in percent: of the training prompt's images, and of the control prompts'.

    ratio: training / controls; None without control prompts, or where they do not differ.
    """

    strength: float
    training: float
    controls: float | None
    ratio: float | None


@dataclass(frozen=True)
class Preview:
    """pictures: prompt by prompt, seed by seed, strength by strength; the first strength is 0, the base model.

    size: of each image, width and height. guidance: None where the pipeline knows no guidance scale.
    """

    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]
    strengths: tuple[float, ...]
    steps: int
    guidance: float | None
    size: Size
    pictures: tuple[Picture, ...]

    def differences(self) -> list[Difference]:
        """One for each strength but 0."""
        found = []
        for strength in self.strengths[1:]:
            training = self._mean(strength, "training")
            controls = self._mean(strength, "control")
            ratio = training / controls if training is not None and controls else None
            found.append(Difference(strength, training or 0.0, controls, ratio))
        return found

    def _mean(self, strength: float, role: str) -> float | None:
        own = [one.difference for one in self.pictures if one.strength == strength and one.prompt.role == role]
        return sum(own) / len(own) if own else None

    def as_dict(self) -> dict[str, Any]:
        """All but the images, JSON-ready."""
        return {
            "size": list(self.size),
            "steps": self.steps,
            "guidance": self.guidance,
            "strengths": list(self.strengths),
            "seeds": list(self.seeds),
            "images": [
                {
                    "role": one.prompt.role,
                    "text": one.prompt.text,
                    "text_2": one.prompt.text_2,
                    "seed": one.seed,
                    "strength": one.strength,
                    "difference": one.difference,
                }
                for one in self.pictures
            ],
            "differences": [vars(one) for one in self.differences()],
        }


def with_base(strengths: Sequence[float]) -> tuple[float, ...]:
    """The strengths, each once, 0 before all others: what everything is held against."""
    return tuple(dict.fromkeys((0.0, *(float(strength) for strength in strengths))))


def render_preview(
    pipeline: Any,
    tensors: Mapping[str, torch.Tensor],
    prompts: Sequence[Prompt],
    *,
    strengths: Sequence[float] = (0.0, 0.5, 1.0),
    seeds: Sequence[int] = (0,),
    steps: int = STEPS,
    guidance: float | None = None,
    size: Size | None = None,
    each: Callable[[int], None] = lambda images: None,
) -> Preview:
    """Make an image for each prompt, seed and strength.

    pipeline: diffusers' own, used where it is and left as it was found, whatever happens.
    tensors: the LoRA in diffusers' spelling, alpha = rank (`lora_forge.files.formats.diffusers_tensors`).
    prompts: of the roles `training` and `control`. strengths: 0 is added where it is not there.
    steps, guidance, size: of each image; without one, the guidance and the size are the pipeline's own.
    each: called before every image with how many there will be.
    Raises LoraFileError for layers that the pipeline has not, or that diffusers does not load, and where an image with
    the LoRA is not finite; ModelError for a pipeline that carries a LoRA already, whose own images are not finite, or
    that needs more memory than there is.
    """
    check_bare(pipeline)
    # What a call changes of the pipeline itself, and of its scheduler, it changes of these copies.
    own = copy.copy(pipeline)
    own.scheduler = copy.deepcopy(pipeline.scheduler)
    own.set_progress_bar_config(disable=True)
    strengths = with_base(strengths)
    number = len(prompts) * len(seeds) * len(strengths)
    call = _Call(own, steps, guidance, size)
    made: dict[tuple[int, int, float], np.ndarray[Any, Any]] = {}

    def draw(strength: float) -> None:
        for index, prompt in enumerate(prompts):
            for seed in seeds:
                each(number)
                made[index, seed, strength] = call.image(prompt, seed, strength)

    with _errors_alone():
        draw(0.0)
        if len(strengths) > 1:
            with lora_in(own, tensors):
                for strength in strengths[1:]:
                    own.set_adapters(ADAPTER, strength)
                    draw(strength)
    pictures = tuple(_pictures(prompts, seeds, strengths, made))
    return Preview(tuple(prompts), tuple(seeds), strengths, steps, call.guidance, pictures[0].image.size, pictures)


def _pictures(
    prompts: Sequence[Prompt], seeds: Sequence[int], strengths: Sequence[float], made: Mapping[Any, Any]
) -> Iterator[Picture]:
    from PIL import Image

    for index, prompt in enumerate(prompts):
        for seed in seeds:
            base = made[index, seed, 0.0]
            for strength in strengths:
                pixels = made[index, seed, strength]
                yield Picture(prompt, seed, strength, Image.fromarray(pixels), difference(base, pixels))


def difference(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """Mean absolute difference of two images `(height, width, 3)` uint8, in percent of 255."""
    import numpy as np

    return float(np.abs(one.astype(np.int16) - other.astype(np.int16)).mean(dtype=np.float64)) / 2.55


class _Call:
    """A pipeline's call for one image."""

    def __init__(self, pipeline: Any, steps: int, guidance: float | None, size: Size | None) -> None:
        self.pipeline = pipeline
        self.known = inspect.signature(pipeline.__call__).parameters
        self.settings: dict[str, Any] = {"num_inference_steps": steps}
        if size is not None:
            self.settings |= {"width": size[0], "height": size[1]}
        self.guidance = None
        if "guidance_scale" in self.known:
            self.guidance = self.known["guidance_scale"].default if guidance is None else guidance
            self.settings["guidance_scale"] = self.guidance

    def image(self, prompt: Prompt, seed: int, strength: float) -> np.ndarray[Any, Any]:
        """`(height, width, 3)` uint8."""
        import numpy as np
        import torch

        texts = {"prompt": prompt.text}
        if prompt.text_2 is not None and "prompt_2" in self.known:
            texts["prompt_2"] = prompt.text_2
        generator = torch.Generator("cpu").manual_seed(seed)
        try:
            made = self.pipeline(**texts, **self.settings, generator=generator, output_type="np").images[0]
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"an image needs more memory than {self.pipeline.device} has; a smaller --size, --dtype float16 or "
                "--device cpu takes less, or is elsewhere"
            ) from error
        if not bool(np.isfinite(made).all()):
            where = f"the image for {prompt.text!r} is not finite"
            if strength:
                raise LoraFileError(f"with this LoRA at strength {strength:g}, {where}")
            raise ModelError(f"without a LoRA, {where}; another --dtype may do, such as float32")
        return (made * 255).round().astype(np.uint8)  # type: ignore[no-any-return]


@contextmanager
def _errors_alone() -> Iterator[None]:
    """diffusers says the same of every image, such as that a prompt is cut; meanwhile it says errors alone."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
