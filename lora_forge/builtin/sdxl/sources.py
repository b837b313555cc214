"""Where an SDXL comes from: a diffusers folder, the Hub, or a single-file checkpoint."""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_forge.builtin.sdxl.single_file import single_file_location
from lora_forge.builtin.sdxl.tiny import TINY, tiny_sdxl_folder
from lora_forge.errors import ModelError

if TYPE_CHECKING:
    import torch

CONFIGS = Path(__file__).parent / "configs"
_WEIGHTS = {
    "text_encoder": ("model", "pytorch_model"),
    "text_encoder_2": ("model", "pytorch_model"),
    "unet": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+\Z")


@dataclass(frozen=True)
class Location:
    """Where one parameter lies: a file, a key in it, and how to take it from the tensor there."""

    file: Path
    key: str
    take: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor


class Source(ABC):
    """One base model's files. Raises ModelError for what is missing or broken."""

    name: str

    @abstractmethod
    def config(self, component: str) -> dict[str, Any]:
        """A component's config.json."""

    @abstractmethod
    def tokenizer(self, name: str) -> Path:
        """A folder with `vocab.json` and `merges.txt`."""

    @abstractmethod
    def weight_files(self, component: str) -> list[Path]:
        """The safetensors files with a component's weights."""

    @abstractmethod
    def locate(self, component: str, canonical: str) -> tuple[str, Callable[[torch.Tensor], torch.Tensor]]:
        """The key a parameter has in the weight files, and how to take it from the tensor there."""

    @abstractmethod
    def load_unet(self, dtype: torch.dtype) -> Any:
        """The UNet, through diffusers."""


class Folder(Source):
    """A folder as diffusers' `save_pretrained` writes it."""

    def __init__(self, root: Path) -> None:
        self.root, self.name = root, root.name

    def find(self, relative: str) -> Path | None:
        path = self.root / relative
        return path if path.is_file() else None

    def _need(self, relative: str) -> Path:
        path = self.find(relative)
        if path is None:
            raise ModelError(f"base model {self.name!r} has no {relative}")
        return path

    def config(self, component: str) -> dict[str, Any]:
        path = self._need(f"{component}/config.json")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"base model {self.name!r}: {component}/config.json is not valid JSON: {error}") from error
        if not isinstance(data, dict):
            raise ModelError(f"base model {self.name!r}: {component}/config.json is not an object")
        return data

    def tokenizer(self, name: str) -> Path:
        files = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
        found = [self.find(f"{name}/{file}") for file in files]
        if found[0] is None or found[1] is None:
            raise ModelError(f"base model {self.name!r} has no {name}/vocab.json and {name}/merges.txt")
        return found[0].parent

    def weight_files(self, component: str) -> list[Path]:
        stem, pickled = _WEIGHTS[component]
        for variant in ("", ".fp16"):
            path = self.find(f"{component}/{stem}{variant}.safetensors")
            if path is not None:
                return [path]
            index = self.find(f"{component}/{stem}.safetensors.index{variant}.json")
            if index is not None:
                return [self._need(f"{component}/{name}") for name in self._indexed(component, index)]
        if self.find(f"{component}/{pickled}.bin"):
            raise ModelError(f"base model {self.name!r}: {component} is a pickle, which is not read; use safetensors")
        raise ModelError(f"base model {self.name!r} has no {component}/{stem}.safetensors")

    def _indexed(self, component: str, index: Path) -> list[str]:
        try:
            return sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"base model {self.name!r}: {component}/{index.name} is no index of weights") from error

    def locate(self, component: str, canonical: str) -> tuple[str, Callable[[torch.Tensor], torch.Tensor]]:
        return canonical, lambda tensor: tensor

    def load_unet(self, dtype: torch.dtype) -> Any:
        from diffusers import UNet2DConditionModel

        file = self.weight_files("unet")[0]
        variant = "fp16" if ".fp16" in file.name else None
        return UNet2DConditionModel.from_pretrained(
            file.parent, torch_dtype=dtype, variant=variant, use_safetensors=True, local_files_only=True
        )


class Hub(Folder):
    """A repository on the Hugging Face Hub, of which only the files asked for are downloaded."""

    def __init__(self, repository: str) -> None:
        self.name = repository

    def find(self, relative: str) -> Path | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
        from huggingface_hub.utils import logging

        logging.set_verbosity_error()  # it would tell of every attempt; what comes of them is told once, below
        try:
            return Path(hf_hub_download(self.name, relative))
        except LocalEntryNotFoundError as error:
            if self._is_cached():
                return None
            raise ModelError(f"base model {self.name!r} is no folder here, and the Hub {_unreachable()}") from error
        except EntryNotFoundError:
            return None
        except Exception as error:  # the Hub's own errors, and those of its HTTP library
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelError(f"base model {self.name!r} is no folder here, and the Hub says: {reason}") from error

    def _is_cached(self) -> bool:
        from huggingface_hub import try_to_load_from_cache

        return isinstance(try_to_load_from_cache(self.name, "text_encoder/config.json"), str)


class SingleFile(Folder):
    """A checkpoint in one .safetensors file; configs and tokenizers come from a folder of their own."""

    def __init__(self, file: Path, configs: Path) -> None:
        super().__init__(configs)
        self.file, self.name = file, file.name

    def weight_files(self, component: str) -> list[Path]:
        return [self.file]

    def locate(self, component: str, canonical: str) -> tuple[str, Callable[[torch.Tensor], torch.Tensor]]:
        return single_file_location(component, canonical)

    def load_unet(self, dtype: torch.dtype) -> Any:
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel.from_single_file(
            str(self.file), config=str(self.root), subfolder="unet", torch_dtype=dtype, local_files_only=True
        )


def _unreachable() -> str:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return "was not asked, since HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else "cannot be reached"


def open_source(name: str, configs: Path | None) -> Source:
    """The source a base model's name means. Raises ModelError when it means none."""
    if name == TINY:
        return Folder(tiny_sdxl_folder())
    path = Path(name).expanduser()
    if os.path.isdir(path):
        return Folder(path)
    if os.path.isfile(path):
        if path.suffix != ".safetensors":
            raise ModelError(f"base model {path.name!r}: only .safetensors checkpoints are read, never pickles")
        folder = configs or CONFIGS
        if not folder.is_dir():
            raise ModelError(f"sdxl.config: {str(folder)!r} is not a folder")
        return SingleFile(path, folder)
    if _HUB_ID.match(name) and path.suffix != ".safetensors":
        return Hub(name)
    raise ModelError(f"base model {name!r} does not exist")
