"""Where a base model comes from: a diffusers folder, the Hub, or a single-file checkpoint."""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_forge.clip_unet.family import UNET, VAE, Family, Take, whole
from lora_forge.clip_unet.tiny import tiny_folder
from lora_forge.errors import ModelError

if TYPE_CHECKING:
    import torch

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+\Z")


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
    def files_to_check(self, component: str) -> list[Path]:
        """Those of the weight files that are on this machine; a component without any weights is an error."""

    @abstractmethod
    def locate(self, component: str, canonical: str) -> tuple[str, Take]:
        """The key a parameter has in the weight files, and how to take it from the tensor there."""

    @abstractmethod
    def load_model(self, component: str, dtype: torch.dtype) -> Any:
        """The UNet or the VAE, through diffusers, on the CPU. Raises what diffusers raises, too."""

    @abstractmethod
    def optional_json(self, relative: str) -> dict[str, Any]:
        """What a JSON file of the model holds; empty where there is none."""


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
        return self._json(self._need(f"{component}/config.json"), f"{component}/config.json")

    def optional_json(self, relative: str) -> dict[str, Any]:
        path = self.find(relative)
        return {} if path is None else self._json(path, relative)

    def _json(self, path: Path, relative: str) -> dict[str, Any]:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"base model {self.name!r}: {relative} is not valid JSON: {error}") from error
        if not isinstance(data, dict):
            raise ModelError(f"base model {self.name!r}: {relative} is not an object")
        return data

    def tokenizer(self, name: str) -> Path:
        files = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
        found = [self.find(f"{name}/{file}") for file in files]
        if found[0] is None or found[1] is None:
            raise ModelError(f"base model {self.name!r} has no {name}/vocab.json and {name}/merges.txt")
        return found[0].parent

    def weight_files(self, component: str) -> list[Path]:
        return [self._need(name) for name in self._weight_names(component)]

    def files_to_check(self, component: str) -> list[Path]:
        return self.weight_files(component)

    def has(self, relative: str) -> bool:
        return self.find(relative) is not None

    def _weight_names(self, component: str) -> list[str]:
        # transformers and diffusers name weight files each in its own way
        own = "diffusion_pytorch_model"
        stem, pickled = (own, own) if component in (UNET, VAE) else ("model", "pytorch_model")
        for variant in ("", ".fp16"):
            name = f"{component}/{stem}{variant}.safetensors"
            if self.has(name):
                return [name]
            index = f"{component}/{stem}.safetensors.index{variant}.json"
            if self.has(index):
                return [f"{component}/{shard}" for shard in self._indexed(component, self._need(index))]
        if self.has(f"{component}/{pickled}.bin"):
            raise ModelError(f"base model {self.name!r}: {component} is a pickle, which is not read; use safetensors")
        raise ModelError(f"base model {self.name!r} has no {component}/{stem}.safetensors")

    def _indexed(self, component: str, index: Path) -> list[str]:
        try:
            return sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"base model {self.name!r}: {component}/{index.name} is no index of weights") from error

    def locate(self, component: str, canonical: str) -> tuple[str, Take]:
        return canonical, whole

    def load_model(self, component: str, dtype: torch.dtype) -> Any:
        file = self.weight_files(component)[0]
        variant = "fp16" if ".fp16" in file.name else None
        self.config(component)  # there by now, for a repository on the Hub too
        return _model_class(component).from_pretrained(
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
            if self._cached(f"{UNET}/config.json"):
                return None
            raise ModelError(f"base model {self.name!r} is no folder here, and the Hub {_unreachable()}") from error
        except EntryNotFoundError:
            return None
        except Exception as error:  # the Hub's own errors, and those of its HTTP library
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelError(f"base model {self.name!r} is no folder here, and the Hub says: {reason}") from error

    def files_to_check(self, component: str) -> list[Path]:
        cached = [self._cached(name) for name in self._weight_names(component)]
        return [path for path in cached if path is not None]

    def has(self, relative: str) -> bool:
        """Whether the repository has a file, without downloading it."""
        from huggingface_hub import file_exists
        from huggingface_hub.constants import HF_HUB_OFFLINE

        if self._cached(relative) is not None:
            return True
        if HF_HUB_OFFLINE and self._cached(f"{UNET}/config.json") is not None:
            return False
        try:
            return bool(file_exists(self.name, relative))
        except Exception as error:  # of the Hub, or of the library it is asked through
            raise ModelError(f"base model {self.name!r} is no folder here, and the Hub {_unreachable()}") from error

    def _cached(self, relative: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.name, relative)
        return Path(path) if isinstance(path, str) else None


class SingleFile(Folder):
    """A checkpoint in one .safetensors file; configs and tokenizers come from a folder of their own."""

    def __init__(self, file: Path, configs: Path, family: Family) -> None:
        super().__init__(configs)
        self.file, self.name, self._family = file, file.name, family

    def weight_files(self, component: str) -> list[Path]:
        return [self.file]

    def locate(self, component: str, canonical: str) -> tuple[str, Take]:
        return self._family.location(component, canonical)

    def load_model(self, component: str, dtype: torch.dtype) -> Any:
        return _model_class(component).from_single_file(
            str(self.file), config=str(self.root), subfolder=component, torch_dtype=dtype, local_files_only=True
        )


def _model_class(component: str) -> Any:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    return UNet2DConditionModel if component == UNET else AutoencoderKL


def _unreachable() -> str:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return "was not asked, since HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else "cannot be reached"


def open_source(name: str, family: Family, configs: Path | None) -> Source:
    """The source a base model's name means; `configs` stands in for the family's own.

    Raises ModelError when it means none.
    """
    if name == family.tiny.name:
        return Folder(tiny_folder(family))
    path = Path(name).expanduser()
    if os.path.isdir(path):
        return Folder(path)
    if os.path.isfile(path):
        if path.suffix != ".safetensors":
            raise ModelError(f"base model {path.name!r}: only .safetensors checkpoints are read, never pickles")
        folder = configs or family.configs
        if not folder.is_dir():
            raise ModelError(f"{family.name}.config: {str(folder)!r} is not a folder")
        return SingleFile(path, folder, family)
    if _HUB_ID.match(name) and path.suffix != ".safetensors":
        return Hub(name)
    hint = f" as one of {family.title}; its tiny model is {family.tiny.name!r}" if name.startswith("tiny_") else ""
    raise ModelError(f"base model {name!r} does not exist{hint}")
