"""Files are written canonically: the same content gives the same bytes in every process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save

import lora_forge
from lora_forge.files.canonical import write_safetensors

TENSORS = {
    "zeta": torch.arange(6.0).reshape(2, 3),
    "alpha": torch.tensor(4.0),
    "mid.half": torch.arange(5, dtype=torch.float16),
    "mid.bfloat": torch.ones(1, 7, dtype=torch.bfloat16),
    "transposed": torch.arange(12.0).reshape(3, 4).T,
    "empty": torch.zeros(0, 3),
}
WRITE = """
import sys
from pathlib import Path
import torch
from lora_forge.builtin import savers
from lora_forge.builtin.backends import lora_forge_backends
from lora_forge.contracts import SaveRequest

layers = [f"text_model.encoder.layers.{i}.self_attn.{p}" for i in range(3) for p in ("q_proj", "v_proj")]
weights = {"text_encoder": {layer: {"lora_A": torch.ones(2, 3), "lora_B": torch.ones(3, 2)} for layer in layers}}
for backend in lora_forge_backends():
    for saver in (savers.universal, savers.diffusers):
        path = Path(sys.argv[1]) / f"{backend.name}_{saver.__name__}.safetensors"
        metadata = {"lora_forge": "{}", "b": "ü", "a": "", **backend.layout.metadata}
        saver(SaveRequest(path, weights, 2, 3.0, backend.name, "a prompt", metadata, backend.layout))
"""


def parts(path: Path) -> tuple[str, bytes]:
    """A file's header as text, and its data section."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return content[8 : 8 + length].decode(), content[8 + length :]


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    processes = []
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        command = [sys.executable, "-c", WRITE, str(tmp_path / seed)]
        processes.append(subprocess.Popen(command, env={**os.environ, "PYTHONHASHSEED": seed}))
    assert [process.wait(120) for process in processes] == [0, 0]
    names = {f"{family}_{saver}.safetensors" for family in ("sdxl", "sd15") for saver in ("universal", "diffusers")}
    assert {path.name for path in (tmp_path / "1").iterdir()} == names
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_two_runs_of_one_seed_write_the_same_bytes_and_another_seed_does_not(model: str, tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "owl.safetensors", tmp_path / "b" / "eagle.safetensors", tmp_path / "c.safetensors"]
    for path, seed in zip(paths, (0, 0, 1), strict=True):
        lora_forge.run("a prompt", model, iterations=2, seed=seed, output=path)
    one, same, other = (path.read_bytes() for path in paths)
    assert one == same
    assert one != other
    assert str(tmp_path).encode() not in one


def test_the_header_is_sorted_and_padded_and_the_data_is_as_the_library_lays_it_out(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    write_safetensors(path, TENSORS, {"b": "2", "a": "1"})
    header, data = parts(path)

    assert len(header.encode()) % 8 == 0
    pairs = json.loads(header, object_pairs_hook=list)
    keys = [key for key, _ in pairs]
    assert keys == sorted(keys)
    assert [key for key, _ in dict(pairs)["__metadata__"]] == ["a", "b"]
    own = save({name: tensor.contiguous() for name, tensor in TENSORS.items()})
    assert data == own[8 + int.from_bytes(own[:8], "little") :]


def test_safetensors_reads_back_every_tensor(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    write_safetensors(path, TENSORS, {})
    back = load_file(path)
    assert back.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)
    assert "__metadata__" not in json.loads(parts(path)[0])


def test_the_order_things_are_given_in_leaves_no_trace(tmp_path: Path) -> None:
    metadata = {"b": "2", "a": "1", "c": "3"}
    write_safetensors(tmp_path / "one", TENSORS, metadata)
    write_safetensors(tmp_path / "two", dict(reversed(TENSORS.items())), dict(reversed(metadata.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@settings(max_examples=60, deadline=None)
@given(metadata=st.dictionaries(st.text(max_size=20), st.text(max_size=60), max_size=6))
def test_any_metadata_comes_back_as_it_was_given(metadata: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.safetensors"
        write_safetensors(path, {"x": torch.ones(2)}, metadata)
        with safe_open(path, framework="pt") as file:
            assert (file.metadata() or {}) == metadata
            assert torch.equal(file.get_tensor("x"), torch.ones(2))


@pytest.mark.parametrize("saver", ["safetensors", "diffusers"])
def test_a_prompt_of_any_script_is_in_the_file_as_it_was_typed(tmp_path: Path, saver: str) -> None:
    prompt = 'ein „Kühlschrank“, 冷蔵庫, ثلاجة, 🦉\n"quoted" \\ back\u2028slash'
    path = tmp_path / "file.safetensors"
    lora_forge.run(prompt, "tiny_sdxl", iterations=0, output=path, saver=saver)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.trigger_phrase"] == prompt
    assert json.loads(metadata["lora_forge"])["run"]["prompt"] == prompt
