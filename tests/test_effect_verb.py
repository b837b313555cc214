"""`lora-forge effect`: against the pipeline run by hand, with ΔW added to its weights."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_reader import open_pipeline
from effect_by_hand import Deltas, added, conditioning, deltas_of, of_role, shift_by_hand, shifts, write_uneven
from safetensors.torch import load_file, save_file

import lora_forge
from lora_forge.cli.main import main
from lora_forge.clip_unet.family import Family
from lora_forge.effect.control_prompts import CONTROL_PROMPTS

OWL = "a steampunk owl"
FEW = ("--random", "1", "--skip-layers")
Effect = Callable[..., dict[str, Any]]


@pytest.fixture
def effect(capsys: pytest.CaptureFixture[str]) -> Effect:
    """What `effect --json` prints."""

    def call(*arguments: str | Path) -> dict[str, Any]:
        capsys.readouterr()
        code = main(["effect", *map(str, arguments), "--device", "cpu", "--json"])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        answer: dict[str, Any] = json.loads(captured.out)
        return answer

    return call


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What `effect` says where it refuses."""

    def call(*arguments: str | Path) -> str:
        capsys.readouterr()
        assert main(["effect", *map(str, arguments)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err

    return call


@pytest.fixture(scope="module")
def pipe(family: Family, model_folder: Path) -> Any:
    return open_pipeline(family.name, model_folder)


@pytest.fixture(scope="module")
def owl(model: str, tmp_path_factory: pytest.TempPathFactory) -> lora_forge.RunResult:
    path = tmp_path_factory.mktemp("owl") / "owl.safetensors"
    return lora_forge.run(OWL, model, iterations=3, target_shift=0.1, output=path)


@pytest.fixture(scope="module")
def uneven(pipe: Any, family: Family, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Deltas]:
    path = tmp_path_factory.mktemp("uneven") / "uneven.safetensors"
    return path, write_uneven(pipe, family.name, path)


def test_the_shift_for_the_training_prompt_is_what_the_run_itself_reported(
    owl: lora_forge.RunResult, effect: Effect
) -> None:
    assert owl.path is not None
    answer = effect(owl.path, *FEW)
    (training,) = of_role(answer, "training")
    assert training["text"] == OWL
    reported = {"conditioning": owl.effect.conditioning_shift, **{one.name: one.relative for one in owl.effect.shifts}}
    assert list(shifts(training)) == list(reported)
    assert shifts(training) == pytest.approx(reported, rel=1e-4)
    cosines = [one["cosine"] for one in training["shifts"][1:]]
    assert cosines == pytest.approx([one.cosine for one in owl.effect.shifts], abs=1e-6)


def test_every_prompts_shift_and_the_prompt_specificity_are_those_of_the_pipeline_run_by_hand(
    owl: lora_forge.RunResult, pipe: Any, effect: Effect, tmp_path: Path
) -> None:
    assert owl.path is not None
    controls = ["a bowl of cherries", "two children on a beach", "the moon"]
    listed = tmp_path / "controls.txt"
    listed.write_text("\n".join([controls[1], "", f"  {controls[2]}  ", OWL]), encoding="utf-8")
    alike = "an owl, steampunk"
    answer = effect(
        owl.path, "--control", controls[0], "--controls-file", listed, "--paraphrase", alike, "--skip-layers"
    )
    asked = [(one["role"], one["text"]) for one in answer["prompts"]]
    assert asked[:3] == [("training", OWL), ("paraphrase", alike), ("control", controls[0])]
    assert sorted(asked[3:]) == [*sorted(("control", one) for one in controls[1:]), ("empty", "")]
    by_hand = {text: shift_by_hand(pipe, text, deltas_of(owl)) for _, text in asked}
    for one in answer["prompts"]:
        assert shifts(one) == pytest.approx(by_hand[one["text"]], rel=1e-3), one["text"]
    for one in answer["specificity"]:
        mean = statistics.mean(by_hand[control][one["name"]] for control in controls)
        assert one["controls"] == pytest.approx(mean, rel=1e-3)
        assert one["ratio"] == pytest.approx(by_hand[OWL][one["name"]] / mean, rel=1e-3)
        assert one["reason"] == ""
    assert [one["name"] for one in answer["specificity"]] == list(by_hand[OWL])


def test_what_each_layer_does_alone_and_what_is_left_without_it_is_as_if_measured_one_at_a_time(
    uneven: tuple[Path, Deltas], model: str, pipe: Any, effect: Effect
) -> None:
    path, deltas = uneven
    assert len(deltas) > 16  # more than one forward pass holds
    answer = effect(path, "--model", model, "--prompt", OWL, "--random", "0", "--leave-one-out")
    assert [(one["component"], one["layer"]) for one in answer["layers"]] == list(deltas)
    whole = shift_by_hand(pipe, OWL, deltas)
    assert shifts(answer["prompts"][0]) == pytest.approx(whole, rel=1e-3)
    for one in answer["layers"]:
        key = (one["component"], one["layer"])
        alone = shift_by_hand(pipe, OWL, {key: deltas[key]})
        without = shift_by_hand(pipe, OWL, {other: delta for other, delta in deltas.items() if other != key})
        assert one["alone"] == pytest.approx(alone["conditioning"], rel=1e-3, abs=1e-6), key
        assert one["without"] == pytest.approx(without["conditioning"], rel=1e-3), key
        assert one["parts"] == pytest.approx(
            {name: alone[name] for name in alone if name.startswith(f"{key[0]} ")}, rel=1e-3, abs=1e-6
        )
        assert one["delta_norm"] == pytest.approx(float(deltas[key].norm()), rel=1e-4)


def test_encoders_whose_outputs_make_one_part_together_give_the_same_shifts(
    effect: Effect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lora_forge.builtin.sdxl.backend import SdxlBackend

    path = tmp_path / "owl.safetensors"
    lora_forge.run(OWL, "tiny_sdxl", iterations=2, target_shift=0.1, output=path)
    apart = effect(path, "--random", "0", "--leave-one-out")
    original = SdxlBackend.conditioning

    def one_part(self: SdxlBackend, outputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {"all of it": torch.cat([part.flatten(1) for part in original(self, outputs).values()], dim=1)}

    monkeypatch.setattr(SdxlBackend, "conditioning", one_part)
    together = effect(path, "--random", "0", "--leave-one-out")
    assert together["tokens"] == []
    assert len(together["layers"]) == len(apart["layers"])
    for one, other in zip(together["layers"], apart["layers"], strict=True):
        assert one["layer"] == other["layer"]
        for name in ("alone", "without"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-7)


def test_each_token_has_its_text_and_its_share_of_the_change(
    owl: lora_forge.RunResult, pipe: Any, effect: Effect
) -> None:
    assert owl.path is not None
    answer = effect(owl.path, *FEW)
    before = conditioning(pipe, OWL)
    with added(pipe, deltas_of(owl)):
        after = conditioning(pipe, OWL)
    sequences = {name: part[0] for name, part in before.items() if part.ndim == 3}
    assert dict.fromkeys(one["part"] for one in answer["tokens"]) == dict.fromkeys(sequences)
    for name, part in sequences.items():
        tokens = [one for one in answer["tokens"] if one["part"] == name]
        change = (after[name][0] - part).norm(dim=1)
        assert [one["relative"] for one in tokens] == pytest.approx((change / part.norm(dim=1)).tolist(), rel=1e-3)
        share = change.square() / change.square().sum()
        assert [one["share"] for one in tokens] == pytest.approx(share.tolist(), rel=2e-3)
        assert [one["position"] for one in tokens] == list(range(77))
        text = [one["text"] for one in tokens if not one["padding"]]
        assert text == ["<|startoftext|>", "a", "steampunk", "owl", "<|endoftext|>"]
        assert name.startswith(tokens[0]["encoder"])


def test_a_second_prompt_is_read_by_the_second_encoder_as_in_the_run_that_made_the_file(
    effect: Effect, tmp_path: Path
) -> None:
    path = tmp_path / "two.safetensors"
    result = lora_forge.run(OWL, "tiny_sdxl", prompt_2="oil painting, brass", iterations=2, output=path)
    for arguments in ((), ("--prompt", OWL, "--prompt-2", "oil painting, brass")):
        training = effect(path, *FEW, *arguments)["prompts"][0]
        assert training["text_2"] == "oil painting, brass"
        assert shifts(training)["conditioning"] == pytest.approx(result.effect.conditioning_shift, rel=1e-4)
    other = effect(path, *FEW, "--prompt", OWL)["prompts"][0]
    assert other["text_2"] is None
    assert shifts(other)["conditioning"] != pytest.approx(result.effect.conditioning_shift, rel=1e-4)


def test_other_formats_of_the_same_lora_have_the_same_effect(
    owl: lora_forge.RunResult, model: str, effect: Effect, tmp_path: Path
) -> None:
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for component, layers in owl.weights.items():
        for layer, pair in layers.items():
            own = tensors.setdefault(component, {})
            own[f"{layer}.lora_A.weight"] = pair["lora_A"].contiguous()
            own[f"{layer}.lora_B.weight"] = owl.alpha / owl.rank * pair["lora_B"]
    whole = {f"{c}.{name}": tensor for c, own in tensors.items() for name, tensor in own.items()}
    save_file(whole, tmp_path / "diffusers.safetensors")
    for component, own in tensors.items():
        (tmp_path / "peft" / component).mkdir(parents=True)
        path = tmp_path / "peft" / component / "adapter_model.safetensors"
        save_file({f"base_model.model.{name}": tensor for name, tensor in own.items()}, path)
    for path in (tmp_path / "diffusers.safetensors", tmp_path / "peft"):
        answer = effect(path, "--model", model, "--prompt", OWL, *FEW)
        assert shifts(answer["prompts"][0])["conditioning"] == pytest.approx(0.1, rel=2e-3)
        assert answer["left_out"] == {"unet": len(owl.weights["unet"])}
        assert any("unet are left out" in note for note in answer["notes"])


def test_control_prompts_are_drawn_by_the_seed_and_never_one_that_was_given(
    owl: lora_forge.RunResult, effect: Effect
) -> None:
    assert owl.path is not None

    def drawn(*arguments: str) -> list[str]:
        answer = effect(owl.path or "", "--skip-layers", *arguments)
        return [one["text"] for one in of_role(answer, "control")]

    first = drawn()
    assert len(first) == len(set(first)) == 16
    assert set(first) < set(CONTROL_PROMPTS)
    assert drawn() == first
    assert drawn("--seed", "1") != first
    assert drawn("--random", "5") == drawn("--random", "5", "--seed", "0")
    others = drawn("--random", str(len(CONTROL_PROMPTS) - 2), "--prompt", first[0], "--paraphrase", first[1])
    assert sorted(others) == sorted(set(CONTROL_PROMPTS) - {*first[:2]})


def test_a_lora_without_text_encoder_layers_moves_nothing_and_needs_no_model_and_no_prompt(
    owl: lora_forge.RunResult, model: str, effect: Effect, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert owl.path is not None
    path = tmp_path / "unet.safetensors"
    save_file({name: one for name, one in load_file(owl.path).items() if name.startswith("lora_unet")}, path)
    layers = len(owl.weights["unet"])
    arguments = ("--model", model, "--base-model", "no/such-model")
    answer = effect(path, *arguments)
    assert (answer["prompts"], answer["layers"], answer["specificity"]) == ([], [], [])
    assert answer["left_out"] == {"unet": layers}
    says = f"no layers of a text encoder, only {layers} layers of unet: it moves nothing of what the denoiser"
    assert answer["notes"][0].startswith(says)
    assert main(["effect", str(path), *arguments]) == 0
    assert says in " ".join(capsys.readouterr().err.split())


def test_a_lora_that_changes_no_weight_has_no_specificity_and_says_so(
    model: str, effect: Effect, tmp_path: Path
) -> None:
    path = tmp_path / "zero.safetensors"
    lora_forge.run(OWL, model, iterations=0, output=path)
    answer = effect(path, "--random", "1", "--leave-one-out")
    assert {shift for one in answer["prompts"] for shift in shifts(one).values()} == {0.0}
    assert {(one["alone"], one["without"], one["delta_norm"]) for one in answer["layers"]} == {(0.0, 0.0, 0.0)}
    assert {one["share"] for one in answer["tokens"]} == {0.0}
    reasons = {(one["ratio"], one["reason"]) for one in answer["specificity"]}
    assert reasons == {(None, "it moves neither the training prompt nor the control prompts")}
    assert "its text-encoder layers move nothing at all" in answer["notes"]


def test_a_shift_below_rounding_gives_no_ratio(effect: Effect, tmp_path: Path) -> None:
    path = tmp_path / "weak.safetensors"
    lora_forge.run(OWL, "tiny_sdxl", iterations=1, target_shift=1e-3, output=path)
    assert all(one["ratio"] for one in effect(path, *FEW)["specificity"])
    rounded = effect(path, *FEW, "--dtype", "bfloat16")["specificity"][0]
    assert rounded["training"] > 0
    assert (rounded["ratio"], rounded["reason"]) == (None, "it moves less than rounding does")


def test_without_control_prompts_there_is_no_specificity(owl: lora_forge.RunResult, effect: Effect) -> None:
    answer = effect(owl.path or "", "--random", "0", "--skip-layers")
    assert [one["role"] for one in answer["prompts"]] == ["training", "empty"]
    assert {(one["controls"], one["ratio"], one["reason"]) for one in answer["specificity"]} == {
        (None, None, "there is no control prompt to compare with")
    }


def test_an_encoder_the_file_has_no_layers_of_is_not_run(effect: Effect, tmp_path: Path) -> None:
    path = tmp_path / "second.safetensors"
    result = lora_forge.run(OWL, "tiny_sdxl", iterations=1, output=tmp_path / "both.safetensors")
    tensors = load_file(result.path or "")
    save_file({name: one for name, one in tensors.items() if name.startswith("lora_te2")}, path)
    answer = effect(path, "--model", "tiny_sdxl", "--prompt", OWL, *FEW)
    assert answer["encoders"] == ["text_encoder_2"]
    assert [name.split()[0] for name in shifts(answer["prompts"][0])] == ["conditioning"] + ["text_encoder_2"] * 2
    assert any(note.startswith("text_encoder: no layers in the file, so it is not run") for note in answer["notes"])


def test_what_the_model_does_not_read_of_a_prompt_is_told(owl: lora_forge.RunResult, effect: Effect) -> None:
    answer = effect(owl.path or "", *FEW, "--control", "owl " * 80 + "the end")
    assert any("the control prompt is longer than the model reads" in note for note in answer["notes"])


def test_a_file_made_on_a_base_model_of_ones_own_is_measured_there(
    model: str, model_folder: Path, effect: Effect, refusal: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "own.safetensors"
    result = lora_forge.run(OWL, model, base_model=str(model_folder), iterations=2, output=path)
    assert "the file's record names it; --base-model says where it is" in refusal(path)
    answer = effect(path, "--base-model", model_folder, *FEW)
    assert answer["base_model"] == str(model_folder)
    assert shifts(answer["prompts"][0])["conditioning"] == pytest.approx(result.effect.conditioning_shift, rel=1e-4)


def test_a_family_from_a_plugin_is_measured_too(effect: Effect, tmp_path: Path) -> None:
    plugin = Path(__file__).parent / "data" / "text_only_backend.py"
    config = tmp_path / "reader_config.json"
    new = ["models", "new", "reader", "--base-model", "tiny_reader", "--plugin", str(plugin), "-o", str(config)]
    assert main([*new, "--rank", "2"]) == 0
    for saver in ("safetensors", "diffusers"):
        path = tmp_path / f"{saver}.safetensors"
        settings: dict[str, Any] = {"model": str(config), "plugins": [plugin], "backend_options": {"length": 40}}
        result = lora_forge.run(OWL, iterations=2, saver=saver, output=path, **settings)
        answer = effect(path, "--plugin", plugin, "--random", "1")
        assert shifts(answer["prompts"][0])["conditioning"] == pytest.approx(result.effect.conditioning_shift, rel=1e-4)
        assert len(answer["layers"]) == len(result.weights["reader"])
        assert len(answer["tokens"]) == 40
        assert answer["tokens"][1]["text"] == str(ord(OWL[0]))  # a backend that gives its tokens no text


def test_the_tables_name_prompts_specificity_layers_and_tokens(
    owl: lora_forge.RunResult, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    arguments = ["effect", str(owl.path), "--random", "2", "--control", "[red]a\x1b[31m bull[/red]"]
    assert main([*arguments, "--leave-one-out"]) == 0
    shown = capsys.readouterr().out
    for text in (OWL, "mean of 3 controls", "prompt specificity", "shift alone", "shift without it", "steampunk"):
        assert text in shown
    assert r"'[red]a\x1b[31m bull[/red]'" in shown
    layers = sum(len(own) for component, own in owl.weights.items() if component != "unet")
    assert f"10 of {layers}" in shown
    assert main([*arguments, "--layers"]) == 0
    shown = capsys.readouterr().out
    for component, own in owl.weights.items():
        assert all((layer in shown) == (component != "unet") for layer in own)


def test_what_cannot_be_measured_is_refused_in_words(
    owl: lora_forge.RunResult, model: str, refusal: Callable[..., str], tmp_path: Path
) -> None:
    assert owl.path is not None
    tensors = load_file(owl.path)
    bare, dora, wide = (tmp_path / f"{name}.safetensors" for name in ("bare", "dora", "wide"))
    save_file(tensors, bare)
    layer = next(name for name in tensors if name.startswith("lora_te")).partition(".")[0]
    save_file({**tensors, f"{layer}.dora_scale": torch.ones(32, 1)}, dora)
    save_file(
        {**tensors, f"{layer}.lora_down.weight": torch.ones(tensors[f"{layer}.lora_down.weight"].shape[0], 7)}, wide
    )
    width = len(tensors[f"{layer}.lora_up.weight"])
    (tmp_path / "empty.txt").write_text("\n \n", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("Kür".encode("latin-1"))
    known = ("--model", model, "--prompt", OWL)
    other = {"tiny_sdxl": "tiny_sd15", "tiny_sd15": "tiny_sdxl"}[model]
    for arguments, words in [
        ((tmp_path / "none.safetensors",), "none.safetensors"),
        ((bare, "--model", model), "holds no record of the prompt it was made for; give it with --prompt"),
        ((bare, "--model", "no_such"), "unknown model 'no_such'"),
        ((owl.path, "--prompt", " "), "the training prompt is blank"),
        ((owl.path, "--control", ""), "the control prompt is blank"),
        ((owl.path, "--random", "1000"), "--random: 1000 control prompts were asked for, the list that ships has"),
        ((owl.path, "--controls-file", tmp_path / "none.txt"), "cannot be read: No such file"),
        ((owl.path, "--controls-file", tmp_path / "latin.txt"), "it is no text in UTF-8"),
        ((owl.path, "--controls-file", tmp_path / "empty.txt"), "holds no prompt"),
        ((owl.path, "--device", "toaster"), "unknown device 'toaster'"),
        ((owl.path, "--dtype", "float8"), "float8"),
        ((owl.path, "--backend-opt", "x=1"), "x"),
        ((owl.path, "--skip-layers", "--leave-one-out"), "give one of them"),
        ((dora, *known), "is of the kind 'dora'"),
        ((wide, *known), f"{layer!r} is [{width}, 7], where the layer of base model"),
        ((bare, "--model", other, "--prompt", OWL), "--model"),
    ]:
        assert words in refusal(*arguments), arguments


def test_a_file_whose_base_model_nothing_tells_needs_it_named(refusal: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "narrow.safetensors"
    name = "base_model.model.encoder.layers.0.self_attn.q_proj"
    save_file({f"{name}.lora_A.weight": torch.ones(1, 8), f"{name}.lora_B.weight": torch.ones(8, 1)}, path)
    assert "--model or --base-model says which base model to measure it on" in refusal(path, "--prompt", OWL)
    assert "which is no linear layer of base model" in refusal(path, "--prompt", OWL, "--model", "tiny_sdxl")


def test_every_option_of_effect_is_on_its_page() -> None:
    from lora_forge.cli.effect import command

    text = (Path(__file__).parent.parent / "docs" / "effect.md").read_text(encoding="utf-8")
    options: Iterable[str] = (name for parameter in command.params for name in parameter.opts if name.startswith("-"))
    assert [name for name in options if f"`{name}`" not in text] == []
