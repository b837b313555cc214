"""A family of a third party, with a text encoder and no UNet: the whole of a run, from the command line."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from distributions import Site, pretend_site, write_plugin
from refusals import refused
from safetensors.torch import load_file
from test_builtin_imports import forbidden

from lora_forge.cli.main import main
from lora_forge.clock import Clock
from lora_forge.config.run import read_run_config
from lora_forge.files.header import read_metadata
from lora_forge.model import open_model
from lora_forge.plan import Request, make_plan
from lora_forge.plugins import Registry, discover
from lora_forge.records import BackendSpec, LossSpec
from lora_forge.result import RunResult
from lora_forge.runner import forge
from lora_forge.testing import check_backend

BACKEND = Path(__file__).parent / "data" / "text_only_backend.py"
EXAMPLE_LOSS = Path(__file__).parent.parent / "plugins" / "lora-forge-example-loss"
PROMPT = "a steampunk owl"
RANK, ALPHA = 2, 3.0
LOSSES = """
from lora_forge import LossSpec, hookimpl

def penultimate(batch):
    return -sum(out.penultimate_hidden_state.abs().mean((1, 2)) for out in batch.adapted().values())

def noise(batch):
    return batch.randn("noise").square()

@hookimpl
def lora_forge_losses():
    yield LossSpec(name="penultimate", summary="", needs={"text"}, factory=penultimate)
    yield LossSpec(name="noise", summary="", needs={"text", "noise_prediction"}, factory=noise)
"""
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two blocks with random weights, as transformers saves one."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("models") / "bert"
    config = BertConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=64,
        pad_token_id=256,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """The current folder, with the example plugin for losses installed there unless it is anyway."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LORA_FORGE_PLUGINS", raising=False)
    with pretend_site(tmp_path, monkeypatch) as pretended:
        write_plugin(tmp_path / "more_losses.py", LOSSES)
        if EXAMPLE_LOSS.name not in {one.name for one in distributions()}:
            project = tomllib.loads((EXAMPLE_LOSS / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            entries = project["entry-points"]["lora_forge"]
            lines = "\n".join(f"{entry} = {module}" for entry, module in entries.items())
            pretended.describe(project["name"], f"[lora_forge]\n{lines}\n".encode(), version=project["version"])
            monkeypatch.syspath_prepend(str(EXAMPLE_LOSS))
        yield pretended


@pytest.fixture
def config(site: Site, bert: Path, capsys: Capture) -> str:
    """A model config of all its layers, as `models new` derives it; its backend is recognized."""
    new = ["models", "new", "bert", "--base-model", str(bert), "--targets", "all", "--plugin", str(BACKEND)]
    assert main([*new, "--rank", str(RANK), "--alpha", str(ALPHA)]) == 0, capsys.readouterr().err
    data = json.loads(Path("bert_config.json").read_text())
    assert data["backend"] == "text_only"
    assert len(data["target_layers_reader"]) == 2 * 6 + 1
    capsys.readouterr()
    return "bert_config.json"


def command(config: str | Path, *arguments: str | Path) -> list[str]:
    """A run of four large steps."""
    start = ["run", "--prompt", PROMPT, "--model", config, "--plugin", BACKEND, "--iterations", "4"]
    return [*map(str, start), "--optimizer-opt", "lr=0.01", *map(str, arguments)]


def run_json(capsys: Capture, *arguments: str | Path) -> dict[str, Any]:
    capsys.readouterr()
    code = main([*command(*arguments), "--json"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    result: dict[str, Any] = json.loads(printed.out)
    return result


def nameless(config: str) -> Path:
    """The same model config for the backend that says no names for its layers."""
    path = Path("nameless_config.json")
    path.write_text(json.dumps({**json.loads(Path(config).read_text()), "backend": "nameless"}))
    return path


def text_only_losses(registry: Registry) -> list[str]:
    """Every loss there is that needs text and nothing more."""
    specs = [cast(LossSpec, one.spec) for one in registry.supplied["loss"]]
    return [spec.name for spec in specs if spec.needs_for(spec.options()) <= {"text"}]


def states(bert: Path, text: str, lora: Path | None = None) -> torch.Tensor:
    """What transformers alone makes of a text, with the LoRA of a file merged into the weights."""
    from transformers import BertModel

    model: Any = BertModel.from_pretrained(bert)
    tensors = load_file(lora) if lora else {}
    for path, layer in model.named_modules():
        name = f"lora_reader_{path.replace('.', '_')}"
        if f"{name}.alpha" in tensors:
            down, up = tensors.pop(f"{name}.lora_down.weight"), tensors.pop(f"{name}.lora_up.weight")
            layer.weight.data += tensors.pop(f"{name}.alpha") / down.shape[0] * up @ down
    assert not tensors, "the file names layers that the model lacks"
    ids = torch.tensor([[257, *text.encode(), 258]])
    ids = torch.cat([ids, torch.full((1, 48 - ids.shape[1]), 256)], dim=1)
    with torch.no_grad():
        hidden: torch.Tensor = model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    return hidden


def test_it_imports_what_a_third_party_may_and_nothing_else() -> None:
    assert forbidden(BACKEND.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("name", ["text_only", "nameless"])
def test_it_keeps_the_contract_of_a_backend(site: Site, name: str) -> None:
    spec = cast(BackendSpec, discover([BACKEND], strict=True).resolve("backend", name).spec)
    check_backend(spec, spec.options())
    check_backend(spec, spec.options(length=20))


def test_the_command_line_checks_it_and_shows_what_it_conditions_on(site: Site, capsys: Capture) -> None:
    assert main(["plugins", "check", "text_only", "--plugin", str(BACKEND)]) == 0
    capsys.readouterr()
    assert main(["plugins", "show", "text_only", "--plugin", str(BACKEND), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["conditioning"] == ["reader states"]
    assert (shown["components"], shown["reaches"]) == (["reader"], {"text": ["reader"]})


def test_every_text_only_loss_there_is_trains_it(site: Site, config: str, capsys: Capture) -> None:
    losses = text_only_losses(discover([BACKEND]))
    assert {"embedding_magnitude", "lean"} <= set(losses)
    for loss in losses:
        result = run_json(capsys, config, "--loss", loss, "-o", f"{loss}.safetensors")
        assert result["after"]["loss"] < result["before"]["loss"], loss
        assert [shift["name"] for shift in result["effect"]["shifts"]] == ["reader states"], loss
        if loss != "embed_preserve":  # which is there to move nothing
            assert result["effect"]["conditioning_shift"] > 1e-3, loss
        assert Path(f"{loss}.safetensors").is_file(), loss
    together = [argument for loss in losses for argument in ("--loss", loss)]
    assert set(run_json(capsys, config, *together, "-o", "all.safetensors")["after"]["terms"]) == set(losses)


def test_the_file_is_named_by_its_layout_and_moves_the_model_as_the_effect_says(
    site: Site, config: str, bert: Path, capsys: Capture
) -> None:
    result = run_json(capsys, config, "-o", "owl.safetensors")
    before, after = states(bert, PROMPT), states(bert, PROMPT, Path("owl.safetensors"))
    assert result["effect"]["conditioning_shift"] == pytest.approx(
        float((after - before).norm() / before.norm()), rel=1e-3
    )
    assert "lora_reader_encoder_layer_0_attention_self_query.alpha" in load_file("owl.safetensors")
    metadata = read_metadata(Path("owl.safetensors"))
    assert metadata["modelspec.architecture"] == "bert/lora"
    record = json.loads(metadata["lora_forge"])["run"]
    assert (record["backend"]["name"], record["backend"]["distribution"]) == ("text_only", BACKEND.stem)
    assert record["base_model"] == bert.name


def test_what_is_printed_speaks_of_its_own_parts(site: Site, config: str, capsys: Capture) -> None:
    assert main(command(config, "-o", "owl.safetensors")) == 0
    printed = capsys.readouterr()
    for words in ("reader", "conditioning", "reader states", "owl.safetensors", "lora = load_file('owl.safetensors')"):
        assert words in printed.out
    for foreign in ("unet", "text_encoder", "StableDiffusion"):
        assert foreign not in printed.out + printed.err


def test_a_dry_run_reads_no_weights(
    site: Site, config: str, bert: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import BertModel

    def no_weights(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(BertModel, "from_pretrained", no_weights)
    record = run_json(capsys, config, "--dry-run", "--backend-opt", "length=20")
    assert (record["layers"], record["loaded"]) == ({"reader": 13}, ["reader"])
    assert record["backend"]["options"] == {"length": 20}
    assert not Path("output").exists()


def test_a_prompt_longer_than_it_reads_is_said_to_be_cut(site: Site, config: str, capsys: Capture) -> None:
    result = run_json(capsys, config, "--backend-opt", "length=11", "-o", "owl.safetensors")
    assert result["warnings"][0].endswith("this is cut off: 'nk owl'")


@pytest.mark.parametrize("saver", ["safetensors", "diffusers"])
def test_a_run_goes_on_from_its_file(site: Site, config: str, capsys: Capture, saver: str) -> None:
    first = run_json(capsys, config, "--saver", saver, "--l2", "0", "-o", "first.safetensors")
    second = run_json(capsys, config, "--init-from", "first.safetensors", "--l2", "0", "-o", "second.safetensors")
    assert second["before"]["loss"] == pytest.approx(first["after"]["loss"], rel=1e-6)
    assert second["after"]["loss"] < second["before"]["loss"]


def test_the_same_run_again_gives_the_same_bytes(site: Site, config: str, capsys: Capture) -> None:
    run_json(capsys, config, "--target-shift", "0.05", "-o", "owl.safetensors")
    again = ["run", "--like", "owl.safetensors", "--plugin", str(BACKEND), "--model", config]
    assert main([*again, "-o", "again.safetensors"]) == 0
    assert "not as owl.safetensors" not in capsys.readouterr().err
    assert Path("again.safetensors").read_bytes() == Path("owl.safetensors").read_bytes()


def test_layers_a_loss_cannot_reach_are_told_dropped_or_refused(site: Site, config: str, capsys: Capture) -> None:
    loss = ["--plugin", "more_losses.py", "--loss", "penultimate"]
    kept = run_json(capsys, config, *loss, "-o", "kept.safetensors")
    assert (kept["inert_layers"], kept["dropped_layers"]) == (7, 0)  # the second block's six, and the pooler
    assert any("reader (7 of 13 layers)" in warning for warning in kept["warnings"])
    dropped = run_json(capsys, config, *loss, "--inert", "drop", "-o", "dropped.safetensors")
    assert (dropped["inert_layers"], dropped["dropped_layers"]) == (7, 7)
    left = load_file("dropped.safetensors")
    assert (len(load_file("kept.safetensors")), len(left)) == (3 * 13, 3 * 6)
    assert all(name.startswith("lora_reader_encoder_layer_0_") for name in left)
    capsys.readouterr()
    assert main(command(config, *loss, "--inert", "error", "-o", "none.safetensors")) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # before it, the library tells of the weights it loads
    assert error.startswith("lora-forge: error: inert: the objective cannot reach reader (7 of 13 layers)")
    assert not Path("none.safetensors").exists()


def test_a_loss_that_needs_a_denoiser_is_refused_in_words(site: Site, config: str, capsys: Capture) -> None:
    loss = ["--plugin", "more_losses.py", "--loss", "embedding_magnitude", "--loss", "noise"]
    error = refused(capsys, *command(config, *loss))
    assert error == "loss 'noise' needs noise_prediction, which backend 'text_only' does not provide\n"
    assert not Path("output").exists()


def test_without_images_there_is_no_preview(site: Site, config: str, capsys: Capture) -> None:
    assert "makes no images, so there is no preview" in refused(capsys, *command(config, "--preview"))


def test_a_text_for_a_second_encoder_is_refused_in_words(site: Site, config: str, capsys: Capture) -> None:
    assert "no second text encoder is in use" in refused(capsys, *command(config, "--prompt-2", "a fox"))


@pytest.mark.parametrize("dry", [False, True])
def test_without_names_for_its_layers_the_default_saver_is_refused_before_a_weight_is_read(
    site: Site, config: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch, dry: bool
) -> None:
    from transformers import BertModel

    def no_weights(*_: object) -> None:
        raise AssertionError("weights were read")

    path = nameless(config)
    monkeypatch.setattr(BertModel, "from_pretrained", no_weights)
    error = refused(capsys, *command(path, *(["--dry-run"] if dry else [])))
    assert error.startswith("saver 'safetensors' has no names for layers of reader, since backend 'nameless' says none")
    assert "choose another saver, such as 'diffusers'" in error
    assert not Path("output").exists()


def test_without_names_for_its_layers_another_saver_writes_the_same_change(
    site: Site, config: str, bert: Path, capsys: Capture
) -> None:
    run_json(capsys, config, "-o", "named.safetensors")
    run_json(capsys, nameless(config), "--saver", "diffusers", "-o", "plain.safetensors")
    named, plain = load_file("named.safetensors"), load_file("plain.safetensors")
    assert len(plain) == 2 * 13
    layer = "encoder.layer.1.attention.self.key"
    name = f"lora_reader_{layer.replace('.', '_')}"
    delta = ALPHA / RANK * named[f"{name}.lora_up.weight"] @ named[f"{name}.lora_down.weight"]
    found = plain[f"reader.{layer}.lora_B.weight"] @ plain[f"reader.{layer}.lora_A.weight"]
    assert delta.any()
    torch.testing.assert_close(found, delta)


def test_prompts_side_by_side_come_out_as_each_does_alone(site: Site, config: str) -> None:
    prompts = (PROMPT, "bond", "three red chairs by the sea")
    together = side_by_side(config, prompts, range(3))
    for seed, prompt in enumerate(prompts):
        (alone,) = side_by_side(config, [prompt], [seed])
        assert [v.loss for v in together[seed].steps] == pytest.approx([v.loss for v in alone.steps], rel=1e-5)
        assert together[seed].effect.conditioning_shift == pytest.approx(alone.effect.conditioning_shift, rel=1e-4)
        for layer, pair in alone.weights["reader"].items():
            for name, expected in pair.items():
                difference = float((together[seed].weights["reader"][layer][name] - expected).norm())
                assert difference <= 1e-5 * float(expected.norm()), (prompt, layer, name)


def side_by_side(config: str, prompts: Sequence[str], seeds: Sequence[int]) -> list[RunResult]:
    registry = discover([BACKEND])
    settings = {"model": config, "iterations": 10, "loss": ["embedding_magnitude", "lean"]}
    plan = make_plan(read_run_config([{"prompt": prompts[0], **settings}]), registry)
    requests = [Request(prompt, None, seed, None) for prompt, seed in zip(prompts, seeds, strict=True)]
    return forge(plan, requests, open_model(plan), registry, Clock())
