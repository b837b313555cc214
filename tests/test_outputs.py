"""What a run writes: several formats at once, side files, another dtype, URLs; whole or not at all."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers_reader import open_pipeline
from PIL import Image
from refusals import refused
from safetensors import safe_open
from safetensors.torch import load_file

import lora_forge
from lora_forge.cli.main import main
from lora_forge.errors import ConfigError, OutputError, RunFailed
from lora_forge.files.header import read_metadata

Capture = pytest.CaptureFixture[str]
TINY = ("run", "--prompt", "an owl", "--model", "tiny_sdxl", "--iterations", "2")
QUICK: dict[str, Any] = {"model": "tiny_sdxl", "iterations": 2}
ALL = ("safetensors", "diffusers", "peft")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder: Path | str = ".") -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def adapter_files(folder: str, *components: str) -> list[str]:
    names = ("adapter_config.json", "adapter_model.safetensors")
    return [f"{folder}/{component}/{name}".lstrip("/") for component in components for name in names]


def test_the_first_saver_keeps_the_given_name_and_the_others_put_theirs_into_it() -> None:
    assert main([*TINY, "-o", "owl", "--saver", "safetensors", "--saver", "diffusers", "--saver", "peft"]) == 0
    folder = adapter_files("owl.peft", "text_encoder", "text_encoder_2", "unet")
    assert files() == ["owl.diffusers.safetensors", "owl.json", *folder, "owl.safetensors"]


def test_a_folder_keeps_the_given_name_if_its_saver_comes_first() -> None:
    assert main([*TINY, "-o", "owl", "--saver", "peft", "--saver", "diffusers", "--inert", "drop"]) == 0
    assert files() == ["owl.diffusers.safetensors", *adapter_files("owl", "text_encoder", "text_encoder_2")]


def test_a_file_is_the_same_whatever_others_its_run_writes(here: Path) -> None:
    lora_forge.run("an owl", **QUICK, output=here / "all/owl", saver=list(ALL))
    for saver, one in zip(ALL, ("owl.safetensors", "owl.diffusers.safetensors", "owl.peft"), strict=True):
        alone = lora_forge.run("an owl", **QUICK, output=here / saver / one, saver=saver).path
        assert alone == here / saver / one
        for name in files(here / saver / one) if saver == "peft" else ["."]:
            assert (here / saver / one / name).read_bytes() == (here / "all" / one / name).read_bytes()


def test_a_result_names_every_file_its_run_wrote(here: Path) -> None:
    result = lora_forge.run("an owl", **QUICK, output="owl", saver=["diffusers", "safetensors"])
    names = ("owl.safetensors", "owl.safetensors.safetensors", "owl.safetensors.json")  # beside what its readers read
    assert result.files == tuple(map(Path, names))
    assert result.path == Path("owl.safetensors")
    assert str(result.path) in result.usage
    assert files() == sorted(names)


def test_options_go_to_the_saver_they_name(capsys: Capture) -> None:
    words = refused(capsys, *TINY, "--saver", "diffusers", "--saver", "peft", "--saver-opt", "x=1")
    assert "say whose: one of diffusers, peft, as NAME.x" in words
    words = refused(capsys, *TINY, "--saver", "diffusers", "--saver", "peft", "--saver-opt", "peft.x=1")
    assert "peft.x: unknown option" in words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-o", "owl.ckpt"), "saver 'safetensors' writes .safetensors files, not .ckpt; give the name without .ckpt"),
        (("-o", "owl.safetensors", "--saver", "peft"), "saver 'peft' writes a folder, not .safetensors"),
        (("--saver", "peft", "--saver", "peft"), "saver: 'peft' is given twice"),
        (("-o", "nosuch://bucket/owl"), "output 'nosuch://bucket/owl' cannot be written"),
        (("-o", "s3://bucket/owl"), "needs a package that is not installed here"),
    ],
)
def test_an_output_that_would_not_be_taken_for_what_it_is_is_refused(
    capsys: Capture, arguments: tuple[str, ...], words: str
) -> None:
    assert words in refused(capsys, *TINY, *arguments)
    assert files() == []


@pytest.mark.parametrize("name", ["owl.v2", "owl.1.5", "owl.ckpts", "OWL.SafeTensors"])
def test_a_dot_in_a_name_is_part_of_it(name: str) -> None:
    result = lora_forge.run("an owl", **QUICK, output=name, sidecar=False)
    assert str(result.path) == (name if name.lower().endswith(".safetensors") else f"{name}.safetensors")


@pytest.mark.parametrize("beside", ["owl.json", "owl.diffusers.safetensors"])
def test_a_file_beside_it_that_exists_is_not_replaced_unless_asked(capsys: Capture, beside: str) -> None:
    Path(beside).write_text("mine", encoding="utf-8")
    given = (*TINY, "-o", "owl", "--saver", "safetensors", "--saver", "diffusers")
    assert f"output {beside!r} exists; --overwrite replaces it" in refused(capsys, *given)
    assert files() == [beside]
    assert Path(beside).read_text(encoding="utf-8") == "mine"
    assert main([*given, "--overwrite"]) == 0
    assert Path(beside).read_bytes() != b"mine"


def test_what_people_wrote_into_a_side_file_is_kept() -> None:
    Path("owl.json").write_text('{"notes": "mine", "activation text": "old"}', encoding="utf-8")
    lora_forge.run("an owl", **QUICK, output="owl", overwrite=True)
    assert json.loads(Path("owl.json").read_text(encoding="utf-8")) == {"notes": "mine", "activation text": "an owl"}


def test_other_people_s_adapters_are_not_replaced(capsys: Capture) -> None:
    lora_forge.run("an owl", **QUICK, output="style", saver="peft")
    config = Path("style/unet/adapter_config.json")
    more = {**json.loads(config.read_text(encoding="utf-8")), "use_rslora": False}  # PEFT's own say more
    config.write_text(json.dumps(more), encoding="utf-8")
    before = files()
    words = refused(capsys, *TINY, "-o", "style", "--saver", "peft", "--overwrite")
    assert "is not a folder that holds adapters alone" in words
    assert files() == before


def test_a_folder_is_replaced_whole_and_one_that_holds_more_than_adapters_is_not(capsys: Capture) -> None:
    given = (*TINY, "-o", "owl", "--saver", "peft")
    assert main([*given]) == 0
    assert "output 'owl' exists" in refused(capsys, *given)
    assert main([*given, "--inert", "drop", "--overwrite"]) == 0
    assert files("owl") == adapter_files("", "text_encoder", "text_encoder_2")
    (Path("owl") / "diary.txt").write_text("mine", encoding="utf-8")
    assert "is not a folder that holds adapters alone" in refused(capsys, *given, "--overwrite")
    assert (Path("owl") / "diary.txt").read_text(encoding="utf-8") == "mine"


FAILS = """
from lora_forge import SaverSpec, hookimpl

def fails(request):
    request.path.write_bytes(b"half")
    raise ValueError("no more")

@hookimpl
def lora_forge_savers():
    yield SaverSpec(name="fails", summary="fails", factory=fails)
"""


def test_when_one_saver_fails_none_of_the_files_appears(here: Path) -> None:
    (here / "fails.py").write_text(FAILS, encoding="utf-8")
    with pytest.raises(RunFailed, match="saver 'fails' failed: ValueError: no more"):
        lora_forge.run("an owl", **QUICK, output="out/owl", saver=[*ALL, "fails"], plugins=["fails.py"])
    assert files("out") == []


# --- side file and metadata


def test_the_side_file_holds_the_prompt_as_activation_text_and_comes_with_the_default_saver_alone() -> None:
    prompt = 'an "owl" 🦉, ふくろう'
    lora_forge.run(prompt, **QUICK, output="a")
    assert json.loads(Path("a.json").read_text(encoding="utf-8")) == {"activation text": prompt}
    lora_forge.run(prompt, **QUICK, output="b", sidecar=False)
    lora_forge.run(prompt, **QUICK, output="c", saver="diffusers")
    lora_forge.run(prompt, **QUICK, output="d", saver="diffusers", sidecar=True)
    assert [name for name in files() if name.endswith(".json")] == ["a.json", "d.json"]


def test_what_is_written_beside_a_file_needs_one() -> None:
    with pytest.raises(OutputError, match="sidecar is written beside the LoRA, and no output is given"):
        lora_forge.run("an owl", **QUICK, sidecar=True)


def naive_hashes(path: Path) -> dict[str, str]:
    """As sd-scripts computes them: of the file that has the training metadata alone."""
    training = {key: text for key, text in read_metadata(path).items() if key.startswith("ss_")}
    content = safetensors.torch.save(load_file(path), training)
    start = 8 + int.from_bytes(content[:8], "little")
    whole = hashlib.sha256(content[start:]).hexdigest()
    return {
        "sshs_model_hash": whole,
        "sshs_legacy_hash": hashlib.sha256(content[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8],
        "modelspec.hash_sha256": f"0x{whole}",
    }


@pytest.mark.parametrize("rank", [1, 32])  # less than 1 MiB, where the legacy hash has nothing to look at, and more
def test_the_hashes_are_those_that_user_interfaces_compute(rank: int) -> None:
    path = lora_forge.run("an owl", **QUICK, output="owl", rank=rank).path
    assert isinstance(path, Path)
    assert (path.stat().st_size > 0x110000) == (rank == 32)
    metadata = read_metadata(path)
    expected = naive_hashes(path)
    assert {key: metadata[key] for key in expected} == expected


def test_the_metadata_has_all_that_modelspec_demands_and_what_user_interfaces_show() -> None:
    path = lora_forge.run("an owl", **QUICK, output="owl", date="2026-01-31").path
    assert isinstance(path, Path)
    metadata = read_metadata(path)
    must = {"sai_model_spec", "architecture", "implementation", "title"}
    should = {"resolution", "description", "date", "hash_sha256"}
    assert {f"modelspec.{key}" for key in must | should} <= set(metadata)
    assert metadata["ss_sd_model_name"] == "tiny_sdxl"
    assert metadata["ss_training_started_at"] == "1769817600"  # 2026-01-31T00:00:00Z
    assert all(isinstance(text, str) and text for text in metadata.values())


# --- another dtype


def deltas(path: Path, scale: float) -> dict[str, torch.Tensor]:
    tensors = {name: tensor.double() for name, tensor in load_file(path).items()}
    downs = [name for name in tensors if name.endswith(".lora_down.weight")]
    return {name: scale * tensors[name.replace("lora_down", "lora_up")] @ tensors[name] for name in downs}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_another_dtype_is_written_and_the_error_it_makes_is_reported(dtype: str, capsys: Capture) -> None:
    settings = {**QUICK, "iterations": 20}
    exact = lora_forge.run("an owl", **settings, output="exact")
    result = lora_forge.run("an owl", **settings, output="rounded", dtype_out=dtype, saver=["safetensors", "diffusers"])
    assert exact.rounding == 0
    for name in ("rounded.safetensors", "rounded.diffusers.safetensors"):
        with safe_open(name, framework="pt") as file:
            kinds = {str(file.get_tensor(key).dtype) for key in file.keys() if not key.endswith(".alpha")}  # noqa: SIM118
        assert kinds == {f"torch.{dtype}"}
    before, after = deltas(Path("exact.safetensors"), 1.0), deltas(Path("rounded.safetensors"), 1.0)
    naive = max(float((after[key] - one).norm() / one.norm()) for key, one in before.items() if one.any())
    assert result.rounding == pytest.approx(naive, rel=1e-5)
    assert 0 < naive < 0.01
    assert main([*TINY, "-o", "again", "--dtype-out", dtype]) == 0
    assert f"rounded to {dtype}: ΔW of a layer is off by up to" in capsys.readouterr().out


def test_a_half_precision_file_that_rounds_once_more_says_so() -> None:
    settings = {**QUICK, "iterations": 5, "alpha": 5.0, "dtype_out": "float16"}
    result = lora_forge.run("an owl", **settings, output="owl", saver=["safetensors", "diffusers"])
    notes = [one for one in result.warnings if one.startswith("saver 'diffusers': text_encoder")]
    assert len(notes) == 2
    assert all("alpha / rank, 1.25, goes into B, which rounds" in note for note in notes)


def test_numbers_beyond_the_dtype_are_an_error_and_nothing_is_written() -> None:
    with pytest.raises(RunFailed, match="its numbers are beyond float16; --dtype-out float32 holds them"):
        lora_forge.run("an owl", **QUICK, output="owl", dtype_out="float16", strength=1e9)
    assert files() == []


def test_a_run_like_another_writes_in_the_same_dtype() -> None:
    lora_forge.run("an owl", **QUICK, output="owl", dtype_out="float16")
    assert main(["run", "--like", "owl.safetensors", "-o", "again"]) == 0
    assert Path("again.safetensors").read_bytes() == Path("owl.safetensors").read_bytes()


@pytest.mark.parametrize("saver", ALL)
def test_a_run_like_that_of_a_file_of_any_format_writes_it_again(saver: str) -> None:
    lora_forge.run("an owl", **QUICK, output="owl", saver=saver)
    first = next(name for name in files() if name.endswith(".safetensors"))
    assert main(["run", "--like", first.partition("/")[0], "-o", "again"]) == 0
    assert Path(first.replace("owl", "again")).read_bytes() == Path(first).read_bytes()


# --- pages and pictures


def test_the_report_and_the_preview_stand_beside_the_file_and_a_cover_within_it() -> None:
    result = lora_forge.run("an owl", **QUICK, output="owl", report=True, preview=True)
    assert files() == ["owl.grid.png", "owl.html", "owl.json", "owl.safetensors"]
    assert {str(place) for place in result.files} == {*files()}
    with Image.open("owl.grid.png") as grid:
        colours = np.unique(np.asarray(grid.convert("RGB")).reshape(-1, 3), axis=0)
        assert len(colours) > 1000  # images, not a sheet of one colour
    metadata = read_metadata(Path("owl.safetensors"))
    (cover,) = json.loads(metadata["ssmd_cover_images"])
    assert metadata["modelspec.thumbnail"] == f"data:image/jpeg;base64,{cover}"
    with Image.open(io.BytesIO(base64.b64decode(cover))) as image:
        assert image.format == "JPEG"
        assert max(image.size) <= 256
    page = Path("owl.html").read_text(encoding="utf-8")
    assert base64.b64encode(Path("owl.grid.png").read_bytes()).decode() in page


def test_a_lora_is_written_without_a_preview_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("all of it")

    monkeypatch.setattr("diffusers.StableDiffusionXLPipeline.__call__", fails)
    result = lora_forge.run("an owl", **QUICK, output="owl", preview=True)
    assert files() == ["owl.json", "owl.safetensors"]
    assert {str(place) for place in result.files} == {*files()}
    (warning,) = (one for one in result.warnings if "preview" in one)
    assert warning.startswith("no preview: an image needs more memory than cpu has")


def test_a_run_like_one_with_a_preview_has_one_too() -> None:
    lora_forge.run("an owl", **QUICK, output="owl", preview=True)
    assert main(["run", "--like", "owl.safetensors", "-o", "again"]) == 0
    assert Path("again.safetensors").read_bytes() == Path("owl.safetensors").read_bytes()


def test_a_preview_leaves_a_session_and_a_pipeline_in_memory_as_they_were(tiny_folder: Path) -> None:
    pipe = open_pipeline("sdxl", tiny_folder)
    parts = (pipe.unet, pipe.text_encoder, pipe.text_encoder_2)
    before = [{name: tensor.clone() for name, tensor in part.state_dict().items()} for part in parts]
    with lora_forge.load("tiny_sdxl", pipeline=pipe) as session:
        first = session.run("an owl", iterations=2, output="a", preview=True)
        second = session.run("an owl", iterations=2, output="b")
    for part, kept in zip(parts, before, strict=True):
        assert all(torch.equal(tensor, kept[name]) for name, tensor in part.state_dict().items())
    assert first.loss_after == second.loss_after
    for component, layers in first.weights.items():
        for name, pair in layers.items():
            assert torch.equal(pair["lora_B"], second.weights[component][name]["lora_B"])


# --- URLs


def test_a_url_gets_the_bytes_that_a_file_gets(bucket: Any) -> None:
    given = (*TINY, "--saver", "safetensors", "--saver", "peft")
    assert main([*given, "-o", "memory://bucket/deep/owl"]) == 0
    assert main([*given, "-o", "deep/owl"]) == 0
    assert sorted(bucket.find("/bucket")) == [f"/bucket/{name}" for name in files()]
    for name in files():
        assert bucket.cat(f"/bucket/{name}") == Path(name).read_bytes()


def test_what_is_at_a_url_is_not_replaced_unless_asked(bucket: Any, capsys: Capture) -> None:
    given = (*TINY, "-o", "memory://bucket/owl.safetensors")
    assert main([*given]) == 0
    assert "exists; --overwrite replaces it" in refused(capsys, *given)
    before = bucket.cat("/bucket/owl.safetensors")
    assert main([*given, "--overwrite", "--iterations", "0"]) == 0
    assert bucket.cat("/bucket/owl.safetensors") != before


@pytest.mark.parametrize("name", ["owl[1]", "an owl*", "owl?"])
def test_a_url_may_hold_what_a_shell_would_expand(bucket: Any, name: str) -> None:
    lora_forge.run("an owl", **QUICK, output=f"memory://bucket/{name}", saver=["diffusers", "peft"])
    names = [f"{name}.safetensors", *adapter_files(f"{name}.peft", "text_encoder", "text_encoder_2", "unet")]
    assert sorted(bucket.store) == sorted(f"/bucket/{one}" for one in names)


def test_a_result_s_url_can_be_given_again_and_a_path_that_was_one_is_refused(bucket: Any) -> None:
    result = lora_forge.run("an owl", **QUICK, output="memory://bucket/owl")
    assert result.usage == ""  # which diffusers does not read
    again = lora_forge.run("an owl", **QUICK, output=result.path, overwrite=True)
    assert again.path == result.path
    with pytest.raises(ConfigError, match="give the URL as text"):
        lora_forge.run("an owl", **QUICK, output=Path("memory://bucket/owl"))


def test_a_file_url_is_a_path(here: Path) -> None:
    result = lora_forge.run("an owl", **QUICK, output=f"{(here / 'an owl').as_uri()}")
    assert result.path == here / "an owl.safetensors"
    assert files() == ["an owl.json", "an owl.safetensors"]
    with pytest.raises(OutputError, match="names a host"):
        lora_forge.run("an owl", **QUICK, output="file://output/owl")


def test_an_upload_that_fails_is_told_in_words_and_leaves_no_half_of_it(
    bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(self: Any, sources: list[str], targets: list[str]) -> None:
        self.pipe(targets[0], b"half")
        raise PermissionError("you may not write here")

    monkeypatch.setattr(type(bucket), "put", half)
    bucket.touch("/bucket/other")
    with pytest.raises(OutputError, match=r"'memory://bucket/owl.*' cannot be written: you may not write here"):
        lora_forge.run("an owl", **QUICK, output="memory://bucket/owl")
    assert bucket.find("/bucket") == ["/bucket/other"]
