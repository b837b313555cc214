"""`lora-forge plugins new`: a complete package for a new plugin of each kind."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from distributions import pretend_site
from fresh_environment import CHECKOUT, FreshEnvironment

from lora_forge.cli.main import main
from lora_forge.errors import PluginError, UsageError
from lora_forge.hookspecs import EXTENSION_POINTS
from lora_forge.scaffold import KINDS, check_name

PROMPT = ["--prompt", "a steampunk owl"]


def new(kind: str, folder: Path, name: str = "") -> int:
    return main(["plugins", "new", name or f"my-{kind}", "--kind", kind, "-o", str(folder)])


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_extension_point_has_a_package_to_start_from() -> None:
    assert set(KINDS) == set(EXTENSION_POINTS)


def test_everything_a_package_needs_is_written_and_listed(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "made" / "here"
    assert new(kind, folder) == 0
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    expected = {"pyproject.toml", "README.md", "LICENSE", ".gitignore", ".github/workflows/test.yml"}
    expected |= {f"my_{kind}/__init__.py", f"my_{kind}/{kind}.py", f"tests/test_my_{kind}.py"}
    assert written == expected | ({"model_config/my_backend_config.json"} if kind == "backend" else set())
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["here"], "nothing else is left behind"

    tree, _, commands = capsys.readouterr().out.partition("Next:")
    assert {line.strip() for line in tree.splitlines()} >= {path.rpartition("/")[2] for path in written}
    assert len(commands.split("\n  ")[1:]) == 3, "three commands to type next"
    assert "pip install" in commands
    assert "pytest" in commands
    assert f"lora-forge {'batch' if kind == 'executor' else 'run'}" in commands


def test_the_entry_point_names_a_module_with_the_plugin_and_its_api(kind: str, tmp_path: Path) -> None:
    assert new(kind, tmp_path / "package") == 0
    project = tomllib.loads((tmp_path / "package" / "pyproject.toml").read_text())["project"]
    assert project["name"] == f"my-{kind}"
    assert project["entry-points"]["lora_forge"] == {f"my_{kind}": f"my_{kind}"}
    assert "lora-forge" in project["dependencies"]
    assert any(requirement.startswith("pytest") for requirement in project["optional-dependencies"]["test"])
    tree = ast.parse((tmp_path / "package" / f"my_{kind}" / "__init__.py").read_text())
    names = {target.id: node.value for node in tree.body if isinstance(node, ast.Assign) for target in node.targets
             if isinstance(target, ast.Name)}  # fmt: skip
    assert ast.literal_eval(names["__lora_forge_api__"]) == 1
    assert {node.name for node in tree.body if isinstance(node, ast.FunctionDef)} == {EXTENSION_POINTS[kind][0]}


def test_the_module_that_lora_forge_imports_imports_nothing_heavy(kind: str, tmp_path: Path) -> None:
    assert new(kind, tmp_path / "package") == 0
    probe = (
        f"import sys, my_{kind}; print({{'torch', 'transformers', 'diffusers', 'peft', 'numpy'}} & set(sys.modules))"
    )
    environment = FreshEnvironment.make(tmp_path / "environment")
    done = environment.execute("-c", probe, cwd=tmp_path / "package")
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr


@pytest.mark.parametrize("name", ["my-{kind}", "a", "a-name-as-long-as-a-name-of-a-plugin-may"])
def test_the_code_that_is_written_is_clean(kind: str, name: str, tmp_path: Path) -> None:
    assert new(kind, tmp_path / "package", name.format(kind=kind)) == 0
    for path in (tmp_path / "package").rglob("*.py"):
        compile(path.read_text(), str(path), "exec")
    config = ["--config", str(CHECKOUT / "pyproject.toml"), "--no-cache", "."]
    for check in (["check"], ["format", "--diff"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *check, *config], cwd=tmp_path / "package", capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_no_file_leaves_a_placeholder_or_names_a_registry(kind: str, tmp_path: Path) -> None:
    assert new(kind, tmp_path / "package") == 0
    for path in (tmp_path / "package").rglob("*.*"):
        if path.is_file():
            text = path.read_text()
            assert "§" not in text, path
            assert "pypi" not in text.lower(), path
            assert text.endswith("\n"), path
            assert not text.endswith("\n\n"), path
    assert "the authors of my-" in (tmp_path / "package" / "LICENSE").read_text()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("My Loss", "'my-loss' would do"),
        ("my.loss", "lower-case letters"),
        ("2nd", "a letter first"),
        ("loss-", "a letter or digit last"),
        ("", "lower-case letters"),
        ("../loss", "'loss' would do"),
        ("long" * 20, "at most 40"),
        ("lambda", "a word of the Python language"),
        ("json", "there is a Python module 'json'"),
        ("torch", "there is a Python module 'torch'"),
        ("lora-forge", "there is a Python module 'lora_forge'"),
        ("tests", "there is a Python module 'tests'"),
        ("embedding-magnitude", "the name of a built-in loss"),
    ],
)
def test_a_name_that_cannot_be_one_is_refused_in_words(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plugins", "new", "--kind", "loss", "--", name]) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_built_in_of_another_kind_does_not_take_a_name() -> None:
    check_name("gaussian", "loss")
    with pytest.raises(PluginError, match="built-in initializer"):
        check_name("gaussian", "initializer")
    with pytest.raises(UsageError, match="built-in backend"):
        check_name("sd15", "backend")


def test_what_exists_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "work.txt").write_text("years of it")
    assert new("loss", folder) == 2
    assert "never overwritten" in capsys.readouterr().err
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("work.txt", "years of it")]


@pytest.mark.parametrize("folder", ["a_file/package", "nul\0"])
def test_a_folder_that_cannot_be_made_is_an_error_in_words(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a_file").write_text("")
    assert new("loss", tmp_path / folder) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a_file"]


def test_a_kind_must_be_given_and_be_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "new", "something"]) == 2
    assert "--kind" in capsys.readouterr().err
    assert main(["plugins", "new", "something", "--kind", "lost"]) == 2
    assert "loss" in capsys.readouterr().err


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A new package of each kind, by kind."""
    folder = tmp_path_factory.mktemp("packages")
    for kind in KINDS:
        assert new(kind, folder / f"my-{kind}") == 0
    return {kind: folder / f"my-{kind}" for kind in KINDS}


@pytest.fixture(scope="module")
def installed(packages: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> FreshEnvironment:
    """An environment with all of them in it, each built into a wheel and installed by pip."""
    wheels = tmp_path_factory.mktemp("wheels")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-index", "--no-deps"]
    command = [*pip, "--no-build-isolation", "--wheel-dir", str(wheels), *map(str, packages.values())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(list(wheels.glob("my_*-0.1.0-py3-none-any.whl"))) == len(KINDS)
    environment = FreshEnvironment.make(tmp_path_factory.mktemp("fresh") / "environment")
    environment.install(*wheels.glob("*.whl"))
    return environment


@pytest.mark.slow
def test_what_is_installed_in_a_fresh_environment_is_there_and_nowhere_else(installed: FreshEnvironment) -> None:
    probe = "import my_loss, torch, lora_forge; print(my_loss.__file__, torch.__file__, lora_forge.__file__)"
    done = installed.execute("-c", probe)
    assert done.returncode == 0, done.stderr
    loss, torch, lora_forge = map(Path, done.stdout.split())
    assert loss.is_relative_to(installed.site)
    assert not torch.is_relative_to(installed.folder)
    assert lora_forge.is_relative_to(CHECKOUT)
    own = {path.name.partition("-")[0] for path in installed.site.glob("*.dist-info")}
    assert own == {f"my_{kind}" for kind in KINDS}, "nothing but the plugins is its own"
    elsewhere = subprocess.run([sys.executable, "-c", "import my_loss"], capture_output=True, text=True)
    assert "ModuleNotFoundError" in elsewhere.stderr


@pytest.mark.slow
def test_each_new_package_passes_its_own_tests_where_it_is_installed(
    packages: dict[str, Path], installed: FreshEnvironment
) -> None:
    command = ["-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = installed.execute(*command, *(folder / "tests" for folder in packages.values()), warm=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    for kind in KINDS:
        assert [line for line in lines if f"test_my_{kind}.py::" in line and "PASSED" in line], kind
    assert "skipped" not in lines[-1]


def test_a_new_backend_is_found_by_the_model_it_recognizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert new("backend", tmp_path / "package", "owl-family") == 0
    monkeypatch.chdir(tmp_path)
    with pretend_site(tmp_path / "package", monkeypatch) as site:
        site.describe("owl-family", b"[lora_forge]\nowl_family = owl_family\n")
        assert (
            main(["models", "new", "mine", "--base-model", "tiny_owl_family", "--targets", "all", "--rank", "8"]) == 0
        )
        derived = json.loads(Path("mine_config.json").read_text())
        assert (derived["backend"], derived["lora_rank"]) == ("owl_family", 8)
        assert len(derived["target_layers_text_encoder"]) == 3 * 6, "six linear layers in each of three blocks"
        assert main(["models", "new", "other", "--base-model", "bert-large"]) == 2
        assert "no backend recognizes base model 'bert-large'" in capsys.readouterr().err
    for module in [name for name in sys.modules if name.partition(".")[0] == "owl_family"]:
        del sys.modules[module]


@pytest.mark.slow
def test_a_run_uses_new_plugins_and_its_file_says_whose_they_are(
    packages: dict[str, Path], installed: FreshEnvironment, tmp_path: Path
) -> None:
    chosen = [word for kind in ("loss", "initializer", "optimizer", "saver") for word in (f"--{kind}", f"my_{kind}")]
    command = ["run", *PROMPT, "--model", "tiny_sdxl", "--iterations", "3", *chosen]
    options = ["--loss-opt", "text=a castle", "--initializer-opt", "gain=0.2", "--optimizer-opt", "momentum=0.5"]
    output = tmp_path / "owl.npz"
    done = installed.run(*command, *options, "-o", output, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    saved = "import json, sys, numpy; print(numpy.load(sys.argv[1])['lora.json'].decode())"
    info = json.loads(installed.execute("-c", saved, output).stdout)
    run = json.loads(info["metadata"]["lora_forge"])["run"]
    used = {"loss": run["loss"][0], **{kind: run[kind] for kind in ("initializer", "optimizer", "saver")}}
    for kind, record in used.items():
        assert (record["distribution"], record["version"]) == (f"my-{kind}", "0.1.0")
        assert (record["name"], record["module"]) == (f"my_{kind}", f"my_{kind}")
    assert used["loss"]["options"] == {"text": "a castle", "amount": 1.0}
    assert (used["initializer"]["options"]["gain"], used["optimizer"]["options"]["momentum"]) == (0.2, 0.5)


@pytest.mark.slow
def test_a_run_on_a_new_backend_needs_its_model_config_and_nothing_else(
    packages: dict[str, Path], installed: FreshEnvironment, tmp_path: Path
) -> None:
    config = packages["backend"] / "model_config" / "my_backend_config.json"
    output = tmp_path / "owl.safetensors"
    command = ["run", *PROMPT, "--iterations", "3", "--json"]
    done = installed.run(*command, "--model", config, "-o", output, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["after"]["loss"] < answer["before"]["loss"]
    assert answer["effect"]["conditioning_shift"] > 0
    from safetensors import safe_open

    with safe_open(output, framework="pt") as file:
        backend = json.loads(file.metadata()["lora_forge"])["run"]["backend"]
        names = set(file.keys())
    assert (backend["distribution"], backend["version"], backend["name"]) == ("my-backend", "0.1.0", "my_backend")
    assert len(names) == 3 * 4 * 3, "A, B and alpha of four layers in each of three blocks"
    assert "lora_te_encoder_layer_0_attention_self_query.lora_down.weight" in names
