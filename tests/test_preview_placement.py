"""Where a pipeline goes: decided from the memory that is free, without a GPU being there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lora_forge.preview.placement import Placement, own_size, place, placement, weight_bytes

GIB = 2**30
SDXL_HALF, SDXL_FULL = 7 * GIB, 14 * GIB  # weights, about


class Fake:
    """A pipeline that notes what is done with it."""

    def __init__(self, **parts: Any) -> None:
        self.done: list[str] = []
        note = self.done.append
        vae = SimpleNamespace(enable_tiling=lambda: note("tiling"), enable_slicing=lambda: note("slicing"))
        self.components = {"unet": nn.Linear(100, 100), "tokenizer": object(), **parts}
        self.vae: Any = vae

    def to(self, device: str) -> None:
        self.done.append(f"to {device}")

    def enable_model_cpu_offload(self, *, device: str) -> None:
        self.done.append(f"offload {device}")


@pytest.mark.parametrize(
    ("weights", "free", "size", "expected"),
    [
        (SDXL_HALF, 78 * GIB, None, Placement()),
        (SDXL_HALF, 22 * GIB, None, Placement()),
        (SDXL_FULL, 22 * GIB, None, Placement(tiled=True)),
        (SDXL_HALF, 11 * GIB, None, Placement(tiled=True)),
        (SDXL_HALF, 8 * GIB, None, Placement(tiled=True, offloaded=True)),
        (SDXL_FULL, 11 * GIB, None, Placement(tiled=True, offloaded=True)),
        (SDXL_HALF, 11 * GIB, (512, 512), Placement()),
        (SDXL_HALF, 22 * GIB, (2048, 2048), Placement(tiled=True)),
        (SDXL_HALF, 0, None, Placement(tiled=True, offloaded=True)),
    ],
)
def test_weights_and_an_image_either_fit_or_are_taken_in_parts(
    weights: int, free: int, size: tuple[int, int] | None, expected: Placement
) -> None:
    assert placement(weights, free, size) == expected


@pytest.mark.parametrize(
    ("free", "done"),
    [
        (GIB, ["to cuda:1"]),
        (16 * 2**20, ["tiling", "slicing", "to cuda:1"]),
        (2**20, ["tiling", "slicing", "offload cuda:1"]),
    ],
)
def test_on_cuda_what_is_done_is_what_the_free_memory_of_that_device_allows(
    free: int, done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def mem_get_info(device: str) -> tuple[int, int]:
        asked.append(device)
        return free, 80 * GIB

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    pipeline = Fake()
    place(pipeline, "cuda:1", (64, 64))
    assert pipeline.done == done
    assert asked == ["cuda:1"]


def test_a_pipeline_whose_vae_knows_no_tiles_is_offloaded_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    pipeline = Fake()
    pipeline.vae = None
    place(pipeline, "cuda", None)
    assert pipeline.done == ["offload cuda"]


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_elsewhere_it_goes_to_its_device_whole(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", None)
    pipeline = Fake()
    assert place(pipeline, device, None) == Placement()
    assert pipeline.done == [f"to {device}"]


def test_weights_that_parts_share_count_once_in_the_bytes_of_their_dtype() -> None:
    shared = nn.Linear(10, 10, bias=False).half()
    norm = nn.BatchNorm1d(4)  # two parameters and two buffers of 4 float32, and a counter of 8 bytes
    pipeline = SimpleNamespace(components={"unet": shared, "same": shared, "norm": norm, "scheduler": None})
    assert weight_bytes(pipeline) == 200 + 4 * 4 * 4 + 8


def test_the_size_of_images_is_told_by_the_pipeline_or_its_unet_or_by_nothing() -> None:
    unet = SimpleNamespace(config=SimpleNamespace(sample_size=64))
    assert own_size(SimpleNamespace(default_sample_size=128, vae_scale_factor=8)) == (1024, 1024)
    assert own_size(SimpleNamespace(unet=unet, vae_scale_factor=8)) == (512, 512)
    assert own_size(SimpleNamespace(vae_scale_factor=8)) is None
    assert own_size(SimpleNamespace(unet=unet)) is None
