"""`lora-forge`: finds the verb, turns errors into one line and an exit code."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable
from types import FrameType
from typing import Any

import click

from lora_forge import __version__
from lora_forge.cli.verbs import Verbs
from lora_forge.errors import LoraForgeError, Terminated

_VERBS = {
    "run": ("lora_forge.cli.run", "Make a LoRA for one prompt."),
    "batch": ("lora_forge.cli.batch", "Make a LoRA for each of many prompts."),
    "compare": ("lora_forge.cli.compare", "Compare objectives on the same prompts, seeds and budget."),
    "inspect": ("lora_forge.cli.inspect", "Say what is in a LoRA file, anybody's, and what it does."),
    "convert": ("lora_forge.cli.convert", "Write a LoRA file in another format."),
    "merge": ("lora_forge.cli.merge", "Make one LoRA of several."),
    "effect": ("lora_forge.cli.effect", "Say, without an image, how far a LoRA file moves a prompt, and others."),
    "preview": ("lora_forge.cli.preview", "Make images without and with a LoRA file, and say how far they differ."),
    "models": ("lora_forge.cli.models", "List, show and make model configs."),
    "plugins": ("lora_forge.cli.plugins", "List, show, check and make plugins."),
}


@click.group(
    cls=Verbs,
    verbs=_VERBS,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="lora-forge COMMAND --help says more.",
)
@click.version_option(__version__, prog_name="lora-forge")
def lora_forge() -> None:
    """A LoRA for one prompt, without images, in seconds.

    \b
    lora-forge run --prompt "a steampunk owl" --model tiny_sdxl
    """


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1, 2, 130 (Ctrl-C) or 143 (SIGTERM)."""
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        result: Any = lora_forge.main(arguments, prog_name="lora-forge", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except LoraForgeError as error:
        return _fail(str(error), error.exit_code, notes=getattr(error, "__notes__", ()))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        return _fail(_lower_first(error.format_message()), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        if sys.stderr.isatty():
            click.echo(err=True)  # past the terminal's own ^C
        return _fail("interrupted; no partial file is left", 130, label="")
    except Terminated:
        return _fail("terminated; no partial file is left", 143, label="")
    finally:
        signal.signal(signal.SIGTERM, previous)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _fail(message: str, code: int, label: str = "error: ", notes: Iterable[str] = ()) -> int:
    for note in notes:
        click.echo(f"lora-forge: warning: {note}", err=True)
    click.echo(f"lora-forge: {label}{message}", err=True)
    return code


def _lower_first(message: str) -> str:
    return message[:1].lower() + message[1:]
