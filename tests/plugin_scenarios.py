"""Third-party distributions, most of them broken, and what every command does with one of them installed.

Each scenario is installed by pip into an environment of its own, where one process carries out all
commands, one after another; the modules of plugins are forgotten in between, so that each command
imports them anew, as a process of its own would. `REFERENCE` is the environment without any.

    outcomes = scenario.carry_out(tmp_path)
    outcomes[RUN].code, outcomes[RUN].stderr
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fresh_environment import FreshEnvironment, wheel

HELP, LIST, LIST_JSON = "--help", "plugins list", "plugins list --json"
SHOW, MODELS = "plugins show adamw", "models list"
_TINY = "run --prompt owl --model tiny_sdxl --date 2026-01-31"
DRY_RUN = f"{_TINY} --output dry.safetensors --dry-run"
RUN = f"{_TINY} --iterations 1 --output owl.safetensors"
# What does not ask for the plugin; `--help` is first, so that nothing has imported the plugin before it.
COMMANDS = (HELP, LIST, LIST_JSON, SHOW, MODELS, DRY_RUN, RUN)
LOADING = (SHOW, DRY_RUN, RUN)  # those that load plugins and give a broken one its line on stderr
STRICT = "plugins list --strict-plugins"
STRICT_RUN = f"{DRY_RUN} --strict-plugins"

_IMPORTS = "from lora_forge import LossSpec, hookimpl\n"
_LOSS = """

def loss(batch):
    return sum(output.last_hidden_state.mean((1, 2)) for output in batch.adapted().values())

"""


def asking(name: str) -> str:
    """The command that asks for a loss by name."""
    return f"{DRY_RUN} --loss {name}"


def _supplying(name: str = "wonder", hook: str = "lora_forge_losses", before_yield: str = "", top: str = "") -> str:
    yields = f'    yield LossSpec(name="{name}", summary="a wonder", factory=loss)\n'
    return f"{top}{_IMPORTS}{_LOSS}\n@hookimpl\ndef {hook}():\n{before_yield}{yields}"


@dataclass(frozen=True)
class Scenario:
    """Distributions by name, each with the source of its one module, and what is expected of them.

    reason: why it is broken, a regular expression; "" if it is not. slow: whether its import takes a line.
    asked: names of losses that are asked for.
    """

    key: str
    title: str
    distributions: Mapping[str, str]
    reason: str = ""
    slow: bool = False
    asked: tuple[str, ...] = ("wonder",)

    @property
    def line(self) -> str:
        """What a command that loads plugins says on stderr, a regular expression; "" if nothing."""
        plugin = f"lora-forge: plugin {next(iter(self.distributions), '')}:plugin"
        if self.slow:
            return rf"{plugin} took \d+\.\d s to import\n"
        return f"{plugin} is broken and ignored: {self.reason}\n" if self.reason else ""

    @property
    def commands(self) -> tuple[str, ...]:
        """Everything that is carried out with it installed."""
        return (*COMMANDS, *map(asking, self.asked), STRICT, STRICT_RUN)

    def environment(self, folder: Path) -> FreshEnvironment:
        """An environment in `folder` with the distributions installed by pip."""
        environment = FreshEnvironment.make(folder / "environment")
        wheels = []
        for name, source in self.distributions.items():
            module = name.replace("-", "_")
            wheels.append(wheel(folder, name, "1.0", {f"{module}.py": source}, {"plugin": module}))
        if wheels:
            environment.install(*wheels)
        return environment

    def carry_out(self, folder: Path) -> dict[str, Outcome]:
        """Each command, in one process in a new environment, and what came of it."""
        return carry_out(self.environment(folder), self.commands)


@dataclass(frozen=True)
class Outcome:
    """What one command did.

    imported: modules of plugins that were imported after it. file: sha256 of the file it wrote, or "".
    raised: what came out of `main`, which should be nothing.
    """

    code: int
    stdout: str
    stderr: str
    imported: list[str]
    file: str
    raised: str


_DRIVER = """
import contextlib, hashlib, io, json, os, sys
from pathlib import Path

site, commands = sys.argv[1], json.loads(sys.argv[2])
from lora_forge.cli.main import main

def of_plugins():
    return sorted(n for n, m in sys.modules.items() if (getattr(m, "__file__", None) or "").startswith(site))

outcomes = {}
for command in commands:
    out, err, code, raised = io.StringIO(), io.StringIO(), -1, ""
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(command.split())
        except BaseException as error:
            raised = repr(error)
    written = sorted(Path().glob("*.safetensors"))
    digest = "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in written)
    for path in written:
        path.unlink()
    imported = of_plugins()
    for name in imported:
        del sys.modules[name]
    outcomes[command] = dict(
        code=code, stdout=out.getvalue(), stderr=err.getvalue(), imported=imported, file=digest, raised=raised
    )
print(json.dumps(outcomes))
"""


def carry_out(environment: FreshEnvironment, commands: Iterable[str]) -> dict[str, Outcome]:
    """Commands in one fresh process of an environment, each as if it were the first to load plugins."""
    work = environment.folder / "work"
    work.mkdir()
    arguments = ("-c", _DRIVER, environment.site, json.dumps(list(commands)))
    done = environment.execute(*arguments, env={"COLUMNS": "200", "NO_COLOR": "1"}, cwd=work, warm=True)
    assert done.returncode == 0, done.stderr
    return {command: Outcome(**outcome) for command, outcome in json.loads(done.stdout).items()}


REFERENCE = Scenario("none", "no plugin", {})


def scenarios(sleep: float) -> tuple[Scenario, ...]:
    """All of them. sleep: seconds that the slow one takes to import."""
    return (
        Scenario(
            "conflict",
            "two distributions with one name",
            {"forge-dusk": _supplying(), "forge-moon": _supplying()},
            asked=("wonder", "forge-dusk:wonder", "forge-moon:wonder"),
        ),
        Scenario(
            "import",
            "raises at import",
            {"forge-import": _supplying(top='raise RuntimeError("no paint")\n')},
            reason="RuntimeError: no paint",
        ),
        Scenario(
            "yield",
            "raises while yielding",
            {"forge-yield": _supplying() + '    raise RuntimeError("out of breath")\n'},
            reason="RuntimeError: out of breath",
        ),
        Scenario(
            "hook",
            "misspells a hook",
            {"forge-hook": _supplying(hook="lora_forge_loses")},
            reason=r"unknown hook 'lora_forge_loses'; did you mean 'lora_forge_losses'\?",
        ),
        Scenario(
            "api",
            "built for another API",
            {"forge-api": _supplying(top="__lora_forge_api__ = 2\nfrom lora_forge import Wonder\n")},
            reason=r"built for plugin API 2; lora-forge \S+ speaks 1: install a newer lora-forge",
        ),
        Scenario(
            "builtin",
            "has a built-in's name",
            {"forge-builtin": _supplying("embedding_magnitude")},
            asked=("embedding_magnitude", "forge-builtin:embedding_magnitude"),
        ),
        Scenario(
            "slow",
            f"sleeps {sleep:g} s at import",
            {"forge-slow": _supplying(top=f"import time\n\ntime.sleep({sleep})\n")},
            slow=True,
        ),
        Scenario(
            "exit",
            "raises SystemExit at import",
            {"forge-exit": _supplying(top="raise SystemExit(3)\n")},
            reason="SystemExit: 3",
        ),
    )


_WELL_MADE = '''"""A plugin as it should be: nothing heavy at its own import."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from lora_forge import LossSpec, hookimpl

__lora_forge_api__ = 1


@dataclass(frozen=True)
class Options:
    towards: str = field(default="", metadata={{"help": "a text"}})
    sharpness: float = field(default=1.0, metadata={{"help": "larger is sharper", "minimum": 0.0}})


@hookimpl
def lora_forge_losses() -> Iterator[LossSpec]:
    yield LossSpec(
        name="wonder_{number}",
        summary="wonder number {number}",
        needs={{"text"}},
        formula="-w",
        source="ours",
        options=Options,
        factory="forge_wonder_{number}.loss:Wonder",
    )
'''
_FACTORY = """import torch


class Wonder:
    def __init__(self, options):
        self.options = options

    def __call__(self, batch):
        return -torch.stack([output.last_hidden_state.mean((1, 2)) for output in batch.adapted().values()]).sum(0)
"""


def well_made(folder: Path, count: int) -> list[Path]:
    """Wheels of `count` plugins, each a package that supplies a loss by a dotted string."""
    wheels = []
    for number in range(count):
        module = f"forge_wonder_{number}"
        files = {f"{module}/__init__.py": "", f"{module}/loss.py": _FACTORY}
        files[f"{module}/plugin.py"] = _WELL_MADE.format(number=number)
        wheels.append(wheel(folder, f"forge-wonder-{number}", "1.0", files, {"plugin": f"{module}.plugin"}))
    return wheels
