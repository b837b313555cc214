"""How like its prompt a picture is, by CLIP."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from lora_forge.errors import ModelError

# Of the pictures CLIP was trained on, per channel; from OpenAI's CLIP.
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


class ClipSimilarity:
    """cos(image(picture), text(prompt)), `(n,)`: Radford et al., arXiv:2103.00020.

    source: the model's name on the Hub, or a folder as transformers saves it, with its tokenizer. It is loaded, in
    float32, when it is first called. Raises ModelError where it cannot be.
    """

    def __init__(self, source: str | Path) -> None:
        self._source = str(source)
        self._texts: dict[str, torch.Tensor] = {}

    def __call__(self, pictures: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        model, tokenizer = _loaded(self._source, str(pictures.device))
        pixels = prepare(pictures, model.config.vision_config.image_size)
        seen = _features(model.get_image_features(pixel_values=pixels))
        for prompt in set(prompts) - set(self._texts):
            tokens = tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").to(pictures.device)
            with torch.no_grad():
                self._texts[prompt] = _features(model.get_text_features(**tokens))[0]
        read = torch.stack([self._texts[prompt].to(pictures.device) for prompt in prompts])
        return functional.cosine_similarity(seen, read, dim=-1)


def prepare(pictures: torch.Tensor, size: int) -> torch.Tensor:
    """Pictures `(n, 3, height, width)` in [0, 1] as CLIP sees them: `(n, 3, size, size)`, with gradient.

    The shorter side becomes `size`, bicubic, and the middle is cut out, as OpenAI's CLIP does it.
    """
    height, width = pictures.shape[-2:]
    shorter = min(height, width)
    scaled = functional.interpolate(
        pictures, (size * height // shorter, size * width // shorter), mode="bicubic", antialias=True
    ).clamp(0, 1)
    top, left = (scaled.shape[-2] - size) // 2, (scaled.shape[-1] - size) // 2
    middle = scaled[..., top : top + size, left : left + size]
    mean, deviation = (torch.tensor(values).to(pictures).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return (middle - mean) / deviation


def _features(output: Any) -> torch.Tensor:
    """transformers 5 gives an output whose `pooler_output` they are; 4 gave them as they are."""
    features: torch.Tensor = getattr(output, "pooler_output", output)
    return features


@functools.lru_cache(maxsize=1)  # once, and not for each batch of a job
def _loaded(source: str, device: str) -> tuple[Any, Any]:
    from transformers import CLIPModel, CLIPTokenizer

    try:
        model: Any = CLIPModel.from_pretrained(source, dtype=torch.float32)
        tokenizer = CLIPTokenizer.from_pretrained(
            source, model_max_length=model.config.text_config.max_position_embeddings
        )
    except Exception as error:  # OSError of a missing one, and the libraries' own of no common type
        raise ModelError(f"CLIP model {source!r} cannot be loaded: {' '.join(str(error).split())}") from error
    return model.requires_grad_(False).eval().to(device), tokenizer
