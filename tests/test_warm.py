"""Processes of `warm.py` are what processes of an environment's own would be."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from distributions import LOSS
from fresh_environment import FreshEnvironment, wheel

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> FreshEnvironment:
    return FreshEnvironment.make(tmp_path_factory.mktemp("warm") / "environment")


@pytest.mark.parametrize(
    "code",
    [
        "import os, sys; print(sys.argv, os.getcwd(), os.environ['OWL'], sys.executable, 'lora_forge' in sys.modules)",
        "import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)",
        "raise SystemExit('words')",
        "raise ValueError('no')",
        "import atexit; atexit.register(print, 'at the end')",
        "import torch; print(torch.ones(2) + 1)",
    ],
    ids=range(6),
)
def test_one_does_what_a_process_of_its_own_does(code: str, environment: FreshEnvironment, tmp_path: Path) -> None:
    own, warm = (
        environment.execute("-c", code, "a b", "é", env={"OWL": "🦉"}, cwd=tmp_path, warm=warm)
        for warm in (False, True)
    )
    assert (own.stdout, own.returncode) == (warm.stdout, warm.returncode)
    assert own.stderr.splitlines()[-1:] == warm.stderr.splitlines()[-1:]


def test_what_one_does_the_next_does_not_see_and_what_is_installed_it_does(
    environment: FreshEnvironment, tmp_path: Path
) -> None:
    environment.execute("-c", "import torch, os; torch.owl = 1; os.environ['OWL'] = '1'", warm=True)
    done = environment.execute("-c", "import torch, os; print(hasattr(torch, 'owl'), 'OWL' in os.environ)", warm=True)
    assert done.stdout == "False False\n"
    files = {"owls.py": LOSS.format(name="owl")}
    assert environment.run("plugins", "show", "owl").returncode == 2
    environment.install(wheel(tmp_path, "forge-owls", "1.0", files, {"plugin": "owls"}))
    assert "forge-owls 1.0" in environment.run("plugins", "show", "owl").stdout
    assert FreshEnvironment.make(tmp_path / "another").run("plugins", "show", "owl").returncode == 2


def test_one_reads_what_is_piped_to_it_and_may_start_another(environment: FreshEnvironment) -> None:
    code = f"import subprocess; subprocess.run({[*environment.warm, '-']!r}, input='print(3)', text=True)"
    done = subprocess.run([*environment.warm, "-"], input=code, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("3\n", "")
