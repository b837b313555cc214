"""Model configs: what is in one is checked against the architecture, all mistakes at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_forge.builtin.sdxl.backend import SdxlBackend
from lora_forge.config.model import (
    DIMENSIONS,
    TARGETS,
    ModelConfig,
    expand_targets,
    parse_model_config,
    read_model_config,
)
from lora_forge.contracts import BackendRequest
from lora_forge.errors import ConfigError, ModelError

Architecture = dict[str, dict[str, tuple[int, int]]]


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> Architecture:
    return SdxlBackend.open(BackendRequest(str(tiny_folder), "cpu", "float32")).architecture()


def small_config(tiny: Architecture, **changes: Any) -> dict[str, Any]:
    """A right model config of tiny_sdxl's encoders; a change of None leaves a key out."""
    data: dict[str, Any] = {"base_model": "tiny_sdxl", "lora_rank": 2, "lora_alpha": 2}
    for component in ("text_encoder", "text_encoder_2"):
        layers = [layer for layer in tiny[component] if layer.endswith("q_proj")]
        data[f"{TARGETS}{component}"] = layers
        data[f"{DIMENSIONS}{component}"] = {layer: list(tiny[component][layer]) for layer in layers}
    data.update(changes)
    return {key: value for key, value in data.items() if value is not None}


def mistakes(tiny: Architecture, data: Any) -> dict[str, str]:
    """Every mistake of a config's content and of what it says of the architecture, by key."""
    try:
        config = parse_model_config(data, name="mine", source="mine_config.json")
        expand_targets(config, tiny, rank=config.lora_rank)
    except ConfigError as error:
        found = error.problems
    else:
        return {}
    assert len({problem.key for problem in found}) == len(found)
    return {problem.key: problem.message for problem in found}


def naive_expansion(config: ModelConfig, architecture: Architecture) -> list[tuple[str, str]]:
    """Layer by layer of the architecture: is it named in full, or is its end, at a dot, named?"""
    found = []
    for component, layers in architecture.items():
        targets = config.targets.get(component, ())
        for layer in layers:
            parts = layer.split(".")
            ends = {".".join(parts[i:]) for i in range(1, len(parts))}
            if any(target == layer or (target in ends and target not in layers) for target in targets):
                found.append((component, layer))
    return found


@st.composite
def some_targets(draw: st.DrawFn) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Suffixes of layers of both encoders, and the full paths they mean."""
    suffixes = st.sampled_from(
        ["q_proj", "self_attn.k_proj", "fc1", "layers.1.mlp.fc2", "layers.0.self_attn.out_proj", "mlp.fc1", "v_proj"]
    )
    short = {c: draw(st.lists(suffixes, max_size=5)) for c in ("text_encoder", "text_encoder_2")}
    if not any(short.values()):
        short["text_encoder"] = ["q_proj"]
    paths = {"text_encoder": 3, "text_encoder_2": 4}
    full = {}
    for component, targets in short.items():
        leaves = [
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.out_proj",
            "mlp.fc1",
            "mlp.fc2",
        ]
        every = [f"text_model.encoder.layers.{i}.{leaf}" for i in range(paths[component]) for leaf in leaves]
        full[component] = [path for path in every if any(path.endswith(f".{target}") for target in targets)]
    return short, full


def config_of(targets: Mapping[str, list[str]], tiny: Architecture) -> ModelConfig:
    data: dict[str, Any] = {"lora_rank": 1, "lora_alpha": 1}
    for component, names in targets.items():
        data[f"{TARGETS}{component}"] = names
        data[f"{DIMENSIONS}{component}"] = {layer: list(size) for layer, size in tiny[component].items()}
    return parse_model_config(data, name="some", source="some_config.json")


@given(both=some_targets(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_suffixes_and_full_paths_in_any_order_expand_to_the_same_layers_each_once(
    tiny: Architecture, both: tuple[dict[str, list[str]], dict[str, list[str]]], data: st.DataObject
) -> None:
    short, full = both
    expected = [(component, layer) for component in full for layer in full[component]]
    shuffled = {component: data.draw(st.permutations(full[component] + short[component])) for component in full}
    for targets in (short, full, shuffled):
        config = config_of(targets, tiny)
        layers = expand_targets(config, tiny, rank=1)
        keys = [layer.key for layer in layers]
        assert len(set(keys)) == len(keys)
        assert sorted(keys) == sorted(expected)
        assert keys == naive_expansion(config, tiny)
        assert all((layer.out_features, layer.in_features) == tiny[layer.component][layer.name] for layer in layers)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_subset_of_layers_expands_to_itself_in_the_architectures_order(
    tiny: Architecture, data: st.DataObject
) -> None:
    every = [(component, layer) for component, layers in tiny.items() for layer in layers]
    chosen = data.draw(st.lists(st.sampled_from(every), min_size=1, max_size=12, unique=True))
    targets: dict[str, list[str]] = {component: [] for component in tiny}
    for component, layer in chosen:
        targets[component].append(layer)
    layers = expand_targets(config_of(targets, tiny), tiny, rank=1)
    assert [layer.key for layer in layers] == [key for key in every if key in set(chosen)]


def test_dimensions_may_be_given_by_suffix_and_a_longer_suffix_wins(tiny: Architecture) -> None:
    data = {
        "lora_rank": 1,
        "lora_alpha": 1,
        f"{TARGETS}unet": ["to_k"],
        f"{DIMENSIONS}unet": {"to_k": [64, 64], "attn2.to_k": [64, 80]},
    }
    assert mistakes(tiny, data) == {}
    data[f"{DIMENSIONS}unet"] = {"to_k": [64, 64]}
    assert set(mistakes(tiny, data)) == {
        f"{DIMENSIONS}unet.{layer}" for layer in tiny["unet"] if layer.endswith("attn2.to_k")
    }


LAYER = "text_model.encoder.layers.0.self_attn.q_proj"
MISTAKES: list[tuple[Callable[[dict[str, Any]], object], str, str]] = [
    (lambda d: d.pop("lora_rank"), "lora_rank", "is missing"),
    (lambda d: d.pop("lora_alpha"), "lora_alpha", "is missing"),
    (lambda d: d.update(lora_rank=0), "lora_rank", "got 0"),
    (lambda d: d.update(lora_rank=-3), "lora_rank", "got -3"),
    (lambda d: d.update(lora_rank=2.5), "lora_rank", "got 2.5"),
    (lambda d: d.update(lora_rank=2.0), "lora_rank", "got 2.0"),
    (lambda d: d.update(lora_rank=True), "lora_rank", "got True"),
    (lambda d: d.update(lora_rank=None), "lora_rank", "got None"),
    (lambda d: d.update(lora_rank="4"), "lora_rank", "got '4'"),
    (lambda d: d.update(lora_rank=33), "lora_rank", "33 is larger than text_encoder.text_model.encoder.layers.0"),
    (lambda d: d.update(lora_alpha=0), "lora_alpha", "> 0"),
    (lambda d: d.update(lora_alpha=float("nan")), "lora_alpha", "nan"),
    (lambda d: d.update(lora_alpha=10**400), "lora_alpha", "expected a number"),
    (lambda d: d.update(iterations=1.5), "iterations", "got 1.5"),
    (lambda d: d.update(iterations=-1), "iterations", "got -1"),
    (lambda d: d.update(learning_rate=0), "learning_rate", "> 0"),
    (lambda d: d.update(regularization_strength=-1e-5), "regularization_strength", "≥ 0"),
    (lambda d: d.update(base_model=7), "base_model", "expected text"),
    (lambda d: d.update(lora_rnk=4), "lora_rnk", "did you mean 'lora_rank'"),
    (lambda d: d.pop(f"{DIMENSIONS}text_encoder"), f"{DIMENSIONS}text_encoder", "is missing"),
    (lambda d: d[f"{DIMENSIONS}text_encoder"].pop(LAYER), f"{DIMENSIONS}text_encoder.{LAYER}", "has no dimensions"),
    (
        lambda d: d[f"{DIMENSIONS}text_encoder"].update({LAYER: [32, 31]}),
        f"{DIMENSIONS}text_encoder.{LAYER}",
        "[out, in] is [32, 31], the real layer's is [32, 32]",
    ),
    (
        lambda d: d[f"{DIMENSIONS}text_encoder"].update({LAYER: [32.0, 32]}),
        f"{DIMENSIONS}text_encoder.{LAYER}",
        "two positive integers",
    ),
    (
        lambda d: d[f"{TARGETS}text_encoder"].append("q_porj"),
        f"{TARGETS}text_encoder.q_porj",
        "no such layer",
    ),
    (
        lambda d: d[f"{TARGETS}text_encoder"].append(LAYER.replace("q_proj", "q_prj")),
        f"{TARGETS}text_encoder.{LAYER.replace('q_proj', 'q_prj')}",
        f"did you mean '{LAYER}'",
    ),
    (
        lambda d: d[f"{DIMENSIONS}text_encoder"].update({LAYER.replace("q_proj", "q_prj"): [32, 32]}),
        f"{DIMENSIONS}text_encoder.{LAYER.replace('q_proj', 'q_prj')}",
        f"did you mean '{LAYER}'",
    ),
    (lambda d: d.update(target_layers_unett=["to_q"]), f"{DIMENSIONS}unett", "is missing"),
    (lambda d: d.update(layer_dimensions_unett={"to_q": [1, 1]}), f"{DIMENSIONS}unett", "did you mean 'unet'"),
    (lambda d: d.update(target_layers_text_encoder="q_proj"), f"{TARGETS}text_encoder", "expected a list"),
    (lambda d: d.update(layer_dimensions_text_encoder=[]), f"{DIMENSIONS}text_encoder", "expected an object"),
]


@pytest.mark.parametrize(("break_it", "key", "words"), MISTAKES)
def test_a_mistake_in_a_model_config_is_named_with_its_key(
    tiny: Architecture, break_it: Callable[[dict[str, Any]], object], key: str, words: str
) -> None:
    data = small_config(tiny)
    assert mistakes(tiny, data) == {}
    break_it(data)
    found = mistakes(tiny, data)
    assert list(found) == [key]
    assert words in found[key]


def test_a_config_without_any_target_layers_is_a_mistake(tiny: Architecture) -> None:
    assert list(mistakes(tiny, {"lora_rank": 1, "lora_alpha": 1})) == [f"{TARGETS}…"]
    assert list(mistakes(tiny, {"lora_rank": 1, "lora_alpha": 1, f"{TARGETS}unet": []})) == [f"{TARGETS}…"]


def test_all_mistakes_of_a_file_are_reported_at_once_those_against_the_architecture_included(
    tiny: Architecture, tmp_path: Path
) -> None:
    from lora_forge.config.run import read_run_config
    from lora_forge.plan import make_plan
    from lora_forge.plugins import discover

    data = small_config(tiny, lora_rank=0, lora_alhpa=1, lora_alpha=None, iterations=2.5)
    data[f"{DIMENSIONS}text_encoder"][LAYER] = [1, 2]
    data[f"{DIMENSIONS}text_encoder_2"][LAYER] = [48]
    data[f"{TARGETS}text_encoder"].append("q_porj")
    del data[f"{DIMENSIONS}text_encoder"][LAYER.replace("0", "1")]
    path = tmp_path / "mine_config.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        make_plan(read_run_config([{"prompt": "an owl", "model": str(path), "loss": "nope"}]), discover())
    assert {problem.key.removeprefix("mine_config.json: ") for problem in raised.value.problems} == {
        "lora_rank",
        "lora_alhpa",
        "lora_alpha",
        "iterations",
        f"{DIMENSIONS}text_encoder.{LAYER}",
        f"{DIMENSIONS}text_encoder_2.{LAYER}",
        f"{TARGETS}text_encoder.q_porj",
        f"{DIMENSIONS}text_encoder.{LAYER.replace('0', '1')}",
        "loss",
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ('{"lora_rank": 4, "lora_rank": 8}', "'lora_rank' appears twice"),
        ('{"layer_dimensions_unet": {"to_q": [1, 1], "to_q": [1, 1]}}', "'to_q' appears twice"),
        ("[]", "a model config is a JSON object"),
        ("3", "a model config is a JSON object"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "not valid JSON"),
    ],
)
def test_a_file_that_is_no_json_object_is_one_mistake(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bad_config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=words) as raised:
        read_model_config(str(path))
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("bad_config.json: ")


def test_bytes_that_are_no_text_are_a_mistake_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "bad_config.json"
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match="not valid JSON"):
        read_model_config(str(path))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sdxl_bsae", "did you mean 'sdxl_base'"),
        ("sd1.5", "did you mean 'sd15'"),
        ("x" * 5000, "unknown model"),
        ("nul\0", "unknown model"),
        ("missing.json", "does not exist"),
        ("", "unknown model"),
    ],
)
def test_an_unknown_model_is_named_with_the_nearest_known_one(name: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        read_model_config(name)


KEYS = ["lora_rank", "lora_alpha", "backend", "base_model", "iterations", "learning_rate", "regularization_strength"]
KEYS += [f"{prefix}{component}" for prefix in (TARGETS, DIMENSIONS) for component in ("text_encoder", "unet", "")]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text() | st.just("q_proj"),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8) | st.sampled_from(["q_proj", LAYER]), inner, max_size=4)
        | st.lists(st.integers(-1, 64), min_size=2, max_size=2)
    ),
    max_leaves=12,
)


@given(data=VALUES | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=6), VALUES, max_size=10))
@settings(max_examples=300, deadline=None)
def test_arbitrary_json_is_a_config_or_mistakes_with_keys_and_nothing_else(tiny: Architecture, data: Any) -> None:
    layers, problems = None, None
    try:
        config = parse_model_config(data, name="any", source="any_config.json")
        layers = expand_targets(config, tiny, rank=config.lora_rank)
    except ConfigError as error:
        problems = error.problems
    if layers is None:
        assert problems
        assert all(problem.message for problem in problems)
    else:
        assert layers
        assert config.lora_alpha > 0
        assert all(1 <= config.lora_rank <= min(layer.out_features, layer.in_features) for layer in layers)
