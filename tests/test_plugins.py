"""Plugins are found one by one; what is broken is named and costs nobody else anything; names are resolved."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributions import LOSS, Site, pretend_site, write_plugin

from lora_forge.cli.main import main
from lora_forge.errors import PluginError
from lora_forge.plugins import discover

BUILTINS = {
    "initializer": {"gaussian", "kaiming", "orthogonal", "gradient"},
    "loss": {
        "embedding_magnitude",
        "conditioning_magnitude",
        "embed_write",
        "embed_direction",
        "embed_preserve",
        "pooled_align",
        "prompt_contrast",
    },
    "optimizer": {"adamw"},
    "saver": {"safetensors", "diffusers", "peft"},
    "backend": {"sdxl", "sd15"},
}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with pretend_site(tmp_path, monkeypatch) as pretended:
        yield pretended


def broken() -> dict[str, str]:
    """What is broken, by plugin id."""
    return {plugin.id: str(plugin.error) for plugin in discover().broken}


def names(kind: str) -> list[str]:
    return [one.spec.name for one in discover().supplied[kind]]


# Discovery


def test_all_built_ins_are_there_and_whole() -> None:
    registry = discover()
    assert {kind: {one.spec.name for one in registry.supplied[kind]} for kind in BUILTINS} == BUILTINS
    assert registry.broken == []
    assert all(one.is_builtin for kind in BUILTINS for one in registry.supplied[kind])


def test_an_installed_plugin_is_found_with_its_provenance(site: Site) -> None:
    site.install("good-losses", LOSS.format(name="small"), version="2.3", entry="mine")
    supplied = discover().resolve("loss", "small")
    assert not supplied.is_builtin
    assert supplied.qualified_name == "good-losses:small"
    assert supplied.provenance() == {
        "kind": "loss",
        "name": "small",
        "distribution": "good-losses",
        "version": "2.3",
        "module": "good_losses_module",
    }


def test_two_distributions_that_use_one_entry_point_name_are_both_loaded(site: Site) -> None:
    site.install("first", LOSS.format(name="one"), entry="plugin")
    site.install("second", LOSS.format(name="two"), entry="plugin")
    registry = discover()
    assert {"one", "two"} <= {one.spec.name for one in registry.supplied["loss"]}
    assert {"first:plugin", "second:plugin"} <= {plugin.id for plugin in registry.plugins}


def test_an_optional_hook_that_no_release_knows_yet_is_accepted(site: Site) -> None:
    hook = "\n@hookimpl(optionalhook=True)\ndef lora_forge_telepathy():\n    yield 1\n"
    site.install("early", LOSS.format(name="small") + hook)
    assert broken() == {}
    assert "small" in names("loss")


def test_a_hook_may_have_another_name_if_it_says_which_it_is(site: Site) -> None:
    hook = "@hookimpl\ndef lora_forge_losses"
    renamed = "@hookimpl(specname='lora_forge_losses')\ndef mine"
    site.install("renamed", LOSS.format(name="small").replace(hook, renamed))
    assert broken() == {}
    assert "small" in names("loss")


# Isolation

SPEC = "from lora_forge import LossSpec, SaverSpec, hookimpl\n@hookimpl\ndef lora_forge_losses():\n    "
AT_IMPORT = [
    ("raise ValueError('no\\nway')", "ValueError: no way"),
    ("import sys; sys.exit(3)", "SystemExit: 3"),
    ("import a_module_that_is_not_there", "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
    ("def (", "SyntaxError: invalid syntax"),
    ("class Mute(Exception):\n    def __str__(self):\n        raise self\nraise Mute", "Mute"),
]
HOOKS = [
    (
        "from lora_forge import hookimpl\n@hookimpl\ndef lora_forge_loses():\n    yield 1",
        "unknown hook 'lora_forge_loses'; did you mean 'lora_forge_losses'?",
    ),
    (
        "from lora_forge import hookimpl\n@hookimpl\ndef lora_forge_step_finish(event):\n    pass",
        "unknown hook 'lora_forge_step_finish'; did you mean 'lora_forge_step_finished'?",
    ),
    ("def lora_forge_losses():\n    yield 1", "lora_forge_losses is not marked with @hookimpl"),
    ("def lora_forge_run_failed(event):\n    pass", "lora_forge_run_failed is not marked with @hookimpl"),
    (
        "from lora_forge import hookimpl\n@hookimpl(specname='lora_forge_loses')\ndef mine():\n    yield 1",
        "unknown hook 'lora_forge_loses'; did you mean 'lora_forge_losses'?",
    ),
    (
        "from lora_forge import hookimpl\n@hookimpl(wrapper=True)\ndef lora_forge_run_failed(event):\n    yield",
        "lora_forge_run_failed is a wrapper, which would never run: hooks are called one by one",
    ),
    (
        SPEC.replace("losses", "savers") + "yield SaverSpec(name='a', summary='s', factory=len, reader='no_colon')",
        "a: reader must be 'package.module:Name', got 'no_colon'",
    ),
    (SPEC + "pass", "TypeError: 'NoneType' object is not iterable"),
    (SPEC.replace("losses()", "losses(surprise)") + "yield 1", "surprise"),
]
RECORDS = [
    ("yield 5", "lora_forge_losses yields int, expected LossSpec"),
    ("yield SaverSpec(name='a', summary='s', factory=len)", "yields SaverSpec, expected LossSpec"),
    ("yield LossSpec(name='Bad Name', summary='s', factory=len)", "bad name 'Bad Name'"),
    ("yield LossSpec(name='', summary='s', factory=len)", "bad name ''"),
    ("yield LossSpec(name='a:b', summary='s', factory=len)", "bad name 'a:b'"),
    ("yield LossSpec(name=3, summary='s', factory=len)", "bad name 3"),
    ("yield LossSpec(name='a', summary=None, factory=len)", "a: summary must be text, got None"),
    ("yield LossSpec(name='a', summary='s', formula=5, factory=len)", "a: formula must be text, got 5"),
    ("yield LossSpec(name='a', summary='s', factory=len, options=dict)", "a: options must be a dataclass type"),
    ("yield LossSpec(name='a', summary='s', factory=len, options=7)", "a: options must be a dataclass type"),
    ("yield LossSpec(name='a', summary='s', factory='no_colon')", "must be 'package.module:Name', got 'no_colon'"),
    ("yield LossSpec(name='a', summary='s', factory='m:')", "must be 'package.module:Name', got 'm:'"),
    ("yield LossSpec(name='a', summary='s', factory=None)", "neither a dotted string nor a callable"),
    ("yield LossSpec(name='a', summary='s', factory=len, needs={'txt'})", "unknown need 'txt'; did you mean 'text'?"),
    ("yield LossSpec(name='a', summary='s', factory=len, needs='text')", "needs must be a set of words, got 'text'"),
    ("yield LossSpec(name='a', summary='s', factory=len, needs=1)", "needs must be a set of words, got 1"),
    ("yield LossSpec(name='a', factory=len)", "missing 1 required keyword-only argument: 'summary'"),
    ("yield from [LossSpec(name='a', summary='s', factory=len)] * 2", "lora_forge_losses yields 'a' twice"),
]


@pytest.mark.parametrize(("source", "reason"), [*AT_IMPORT, *HOOKS, *((SPEC + body, why) for body, why in RECORDS)])
def test_a_broken_plugin_is_recorded_with_its_reason_on_one_line_and_supplies_nothing(
    site: Site, source: str, reason: str
) -> None:
    site.install("bad", source)
    site.install("good", LOSS.format(name="small"))
    registry = discover()
    assert [plugin.id for plugin in registry.broken] == ["bad:plugin"]
    error = str(registry.broken[0].error)
    assert reason in error
    assert "\n" not in error
    assert {one.spec.name for one in registry.supplied["loss"]} == BUILTINS["loss"] | {"small"}


def test_a_generator_that_raises_after_a_good_spec_supplies_none_of_them(site: Site) -> None:
    site.install("half", LOSS.format(name="small") + "    raise RuntimeError('out of specs')\n")
    assert broken() == {"half:plugin": "RuntimeError: out of specs"}
    assert "small" not in names("loss")


def test_options_whose_types_cannot_be_evaluated_break_the_plugin_and_not_the_command(site: Site) -> None:
    options = "from dataclasses import dataclass\n@dataclass\nclass Options:\n    size: 'Nowhere' = 1\n" + LOSS.format(
        name="small"
    ).replace("factory=small", "factory=small, options=Options")
    site.install("odd", options)
    assert broken() == {"odd:plugin": "NameError: name 'Nowhere' is not defined"}


def test_the_observers_of_a_broken_plugin_are_not_called(site: Site) -> None:
    observer = "\n@hookimpl\ndef lora_forge_run_started(event):\n    raise ValueError('called')\n"
    site.install("half", LOSS.format(name="Bad Name") + observer)
    registry = discover()
    assert len(registry.broken) == 1
    assert registry.notify("lora_forge_run_started", object()) == []


@pytest.mark.parametrize(
    ("entry_points", "metadata"),
    [
        (b"[lora_forge]\nno value here\n", True),
        (b"\xff\xfe[lora_forge]", True),
        (b"[lora_forge]\nplugin = not a module!\n", True),
        (b"[lora_forge]\nplugin = not_there_module\n", False),
        (b"[somebody_else]\nno value here\n", False),
    ],
)
def test_a_distribution_with_unreadable_metadata_hides_no_other(
    site: Site, entry_points: bytes, metadata: bool
) -> None:
    site.describe("aaa", entry_points, metadata=metadata)
    site.install("good", LOSS.format(name="small"))
    registry = discover()
    assert [plugin.distribution for plugin in registry.broken] == ["aaa" if metadata else "unknown"]
    assert registry.resolve("loss", "small").plugin.id == "good:plugin"


def test_ctrl_c_while_a_plugin_is_imported_is_not_the_plugins_mistake(site: Site) -> None:
    site.install("slow", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        discover()
    assert main(["plugins", "list"]) == 130


def test_sigterm_while_a_plugin_is_imported_is_not_the_plugins_mistake(site: Site) -> None:
    site.install("slow", f"import os\nos.kill({os.getpid()}, {int(signal.SIGTERM)})")
    assert main(["plugins", "list"]) == 143


def test_a_broken_plugin_costs_a_run_one_line_on_stderr(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    site.install("bad", "raise ValueError('no way')")
    output = site.folder / "out.safetensors"
    assert main(["run", "--prompt", "an owl", "--model", "tiny_sdxl", "--iterations", "1", "-o", str(output)]) == 0
    captured = capfd.readouterr()
    assert [line for line in captured.err.splitlines() if "bad" in line] == [
        "lora-forge: plugin bad:plugin is broken and ignored: ValueError: no way"
    ]
    assert "Traceback" not in captured.err + captured.out
    assert output.is_file()


def test_what_a_plugin_prints_at_its_import_or_while_yielding_is_not_in_what_a_command_prints(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plugins", "show", "adamw"]) == 0
    quiet = capsys.readouterr()
    site.install("chatty", "print('hello')\n" + LOSS.format(name="small") + "    print('that is all')\n")
    assert main(["plugins", "show", "adamw"]) == 0
    assert capsys.readouterr() == (quiet.out, quiet.err + "hello\nthat is all\n")


def test_the_cause_is_in_the_error_when_the_name_may_have_come_from_a_broken_plugin(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.install("bad", "raise ValueError('no way')")
    assert main(["run", "--prompt", "an owl", "--model", "tiny_sdxl", "--loss", "wonder"]) == 2
    error = capsys.readouterr().err.partition("lora-forge: error: ")[2]
    assert "unknown loss 'wonder'" in error
    assert "it may have come from bad:plugin, which is broken: ValueError: no way" in error


def test_a_broken_plugin_is_not_suspected_of_another_distributions_names(site: Site) -> None:
    site.install("bad", "raise ValueError('no way')")
    site.install("good", LOSS.format(name="small"))
    with pytest.raises(PluginError) as caught:
        discover().resolve("loss", "good:smal")
    assert str(caught.value) == "unknown loss 'good:smal'; did you mean 'good:small'?"
    with pytest.raises(PluginError, match="it may have come from bad:plugin"):
        discover().resolve("loss", "bad:smal")


# Resolution


def test_a_bare_name_that_a_built_in_has_always_means_the_built_in(site: Site) -> None:
    site.install("rival", LOSS.format(name="embedding_magnitude"))
    registry = discover()
    assert registry.resolve("loss", "embedding_magnitude").plugin.distribution == "lora-forge"
    assert registry.resolve("loss", "lora-forge:embedding_magnitude").is_builtin
    assert registry.resolve("loss", "rival:embedding_magnitude").plugin.distribution == "rival"


def test_two_plugins_with_one_name_are_an_error_only_when_that_name_is_asked_for(site: Site) -> None:
    site.install("first", LOSS.format(name="small"))
    site.install("sec-ond", LOSS.format(name="small"))
    registry = discover()
    assert registry.broken == []
    assert registry.resolve("loss", "embedding_magnitude").is_builtin
    with pytest.raises(PluginError) as caught:
        registry.resolve("loss", "small")
    assert str(caught.value) == "2 plugins supply the loss 'small'; say which: 'first:small' or 'sec-ond:small'"
    assert registry.resolve("loss", "first:small").plugin.id == "first:plugin"
    assert registry.resolve("loss", "Sec_Ond:small").plugin.id == "sec-ond:plugin"


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("loss", "embeding_magnitude", "unknown loss 'embeding_magnitude'; did you mean 'embedding_magnitude'?"),
        ("optimizer", "zzz", "unknown optimizer 'zzz'; known: adamw"),
        ("saver", "lora-forge:diffuser", "unknown saver 'lora-forge:diffuser'; did you mean 'lora-forge:diffusers'?"),
        ("saver", "nobody:diffusers", "unknown saver 'nobody:diffusers'; did you mean 'lora-forge:diffusers'?"),
    ],
)
def test_an_unknown_name_is_named_with_the_nearest_known_one(kind: str, name: str, message: str) -> None:
    with pytest.raises(PluginError) as caught:
        discover().resolve(kind, name)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ("components=None", "bad: components must be a tuple of names, got None"),
        ("encoders='text_encoder'", "bad: encoders must be a tuple of names, got 'text_encoder'"),
        ("reaches={'text': None}", "bad: reaches['text'] must be a tuple of names, got None"),
        ("reaches=7", "bad: reaches must be a mapping of needs to components, got 7"),
        ("tiny=7", "bad: tiny must be text, got 7"),
        ("conditioning=None", "bad: conditioning must be a tuple of names, got None"),
        ("conditioning='pooled'", "bad: conditioning must be a tuple of names, got 'pooled'"),
        ("conditioning=(1,)", "bad: conditioning must be a tuple of names, got (1,)"),
        ("layout='kohya'", "bad: layout must be a FileLayout, got 'kohya'"),
        ("layout={}", "bad: layout must be a FileLayout, got {}"),
        (
            "layout=FileLayout(prefixes=('lora_te',))",
            "bad: layout.prefixes must be a mapping of text to text, got ('lora_te',)",
        ),
        (
            "layout=FileLayout(prefixes={'unet': None})",
            "bad: layout.prefixes must be a mapping of text to text, got {'unet': None}",
        ),
        (
            "layout=FileLayout(prefixes={}, metadata={'ss_v2': False})",
            "bad: layout.metadata must be a mapping of text to text, got {'ss_v2': False}",
        ),
        (
            "layout=FileLayout(prefixes={}, ldm_names='unet')",
            "bad: layout.ldm_names must be a tuple of names, got 'unet'",
        ),
        ("recognizes=7", "bad: recognizes is neither a dotted string nor a callable, but 7"),
        ("recognizes='is_it'", "bad: recognizes must be 'package.module:Name', got 'is_it'"),
    ],
)
def test_a_backend_whose_record_is_malformed_is_broken_and_shown_as_such(site: Site, fields: str, reason: str) -> None:
    hook = "@hookimpl\ndef lora_forge_backends():\n"
    spec = f"    yield BackendSpec(name='bad', summary='s', factory=len, {fields})\n"
    site.install("bad", "from lora_forge import BackendSpec, FileLayout, hookimpl\n" + hook + spec)
    assert [plugin.error for plugin in discover().broken] == [reason]


def test_a_plugin_file_and_a_distribution_that_differ_by_a_hyphen_are_told_apart(site: Site) -> None:
    site.install("my-loss", LOSS.format(name="small"))
    registry = discover([write_plugin(site.folder / "my_loss.py", LOSS.format(name="small"))])
    assert registry.resolve("loss", "my_loss:small").plugin.id == "my_loss:file"
    assert registry.resolve("loss", "my-loss:small").plugin.id == "my-loss:plugin"


def test_a_plugin_file_cannot_pass_for_what_ships(site: Site) -> None:
    with pytest.raises(PluginError, match="the name of what ships"):
        discover([write_plugin(site.folder / "lora_forge.py", LOSS.format(name="small"))])


def test_a_plugin_file_of_a_package_is_named_after_the_packages_folder(site: Site) -> None:
    for name in ("night", "day"):
        (site.folder / name).mkdir()
        (site.folder / name / "words.py").write_text(f"NAME = '{name}'\n")
        source = LOSS.format(name="{NAME}").replace('"{NAME}"', "NAME")
        write_plugin(site.folder / name / "__init__.py", f"from .words import NAME\n{source}")
    registry = discover([site.folder / name / "__init__.py" for name in ("night", "day")])
    found = registry.resolve("loss", "night:night").plugin
    assert (found.id, found.distribution, found.module) == ("night:file", "night", "night/__init__.py")
    assert registry.resolve("loss", "day").plugin.id == "day:file"


def test_a_folder_in_place_of_a_plugin_file_is_told_to_be_one_and_which_file_to_give(site: Site) -> None:
    folder = site.folder / "night"
    folder.mkdir()
    with pytest.raises(PluginError, match=r"night' is a folder; give the file that has the hooks, such as a \.py file"):
        discover([folder])
    for name in ("spec.py", "__init__.py"):
        (folder / name).touch()
    with pytest.raises(PluginError, match=r"is a folder; .* such as '.*night/__init__\.py'"):
        discover([folder])
