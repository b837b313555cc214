"""What the verbs share that try a LoRA file on its base model: options, its prompt, control prompts, a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_forge.cli.pairs import read_pair
from lora_forge.cli.registry import plugin_options
from lora_forge.config.run import RunConfig, read_run_config
from lora_forge.errors import UsageError
from lora_forge.options import Text

if TYPE_CHECKING:
    from lora_forge.effect.of_file import Prompt

_DTYPES = "float32|float16|bfloat16"


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--model` and what else says which base model the file is tried on, how, and with which plugins."""
    options = (
        click.option(
            "--model",
            default=None,
            help="model config of the base model  [default: as the file's record, or its family, says]",
        ),
        click.option("--base-model", default=None, help="where the weights come from: Hub id, folder or .safetensors"),
        click.option(
            "--backend-opt", multiple=True, metavar="KEY=VALUE", help="an option of the model's backend; repeatable"
        ),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps"),
        click.option(
            "--dtype",
            default="float32",
            show_default=True,
            metavar=_DTYPES,
            help="of frozen weights and activations",
        ),
        plugin_options,
    )
    for option in reversed(options):
        function = option(function)
    return function


def checked_config(given: Mapping[str, Any]) -> RunConfig:
    """What `model_options` gave, checked as a run's are. Raises ConfigError."""
    values: dict[str, Any] = {key: Text(given[key]) for key in ("device", "dtype")}
    if given["base_model"] is not None:
        values["base_model"] = Text(given["base_model"])
    options = dict(read_pair(text, "--backend-opt") for text in given["backend_opt"])
    return read_run_config(
        [{**values, "plugins": given["plugins"], "strict_plugins": given["strict_plugins"], "backend_options": options}]
    )


def training_prompt(file: Path, run: Mapping[str, Any], text: str | None, text_2: str | None) -> Prompt:
    """The prompt given, or the one in the record of the run that made the file. Raises UsageError without either."""
    from lora_forge.effect.of_file import Prompt

    if text is None:
        text = run.get("prompt")
        text_2 = run.get("prompt_2") if text_2 is None else text_2
        if not isinstance(text, str) or not isinstance(text_2, str | None):
            raise UsageError(f"{str(file)!r} holds no record of the prompt it was made for; give it with --prompt")
    return Prompt("training", text, text_2)


def check_text(role: str, *texts: str | None) -> None:
    """Raises UsageError for a prompt that is blank, or half a letter."""
    for words in texts:
        if words is not None and (not words.strip() or any("\ud800" <= letter <= "\udfff" for letter in words)):
            raise UsageError(f"the {role} prompt {'is not valid Unicode' if words.strip() else 'is blank'}: {words!r}")


@contextmanager
def progress(doing: str) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, and nothing elsewhere: to be called before every piece of work with how many there are."""
    import sys

    if not sys.stderr.isatty():
        yield lambda total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=None)
        begun = -1

        def each(total: int) -> None:
            nonlocal begun
            begun += 1
            bar.update(task, description=doing, total=total, completed=begun)

        yield each
