"""The garbage collector rests while a command imports, and is as it was afterwards."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SCRIPT = """
import gc, json, sys
seen = []
from lora_forge import hookimpl
from lora_forge.cli.collector import StartUp
with StartUp() as start_up:
    seen.append(gc.isenabled())
    if {fails}:
        pass
    else:
        start_up.lora_forge_run_started(None)
        seen += [gc.isenabled(), gc.get_freeze_count() > 0]
seen.append(gc.isenabled())
print(json.dumps(seen))
"""


@pytest.mark.parametrize(("fails", "expected"), [(False, [False, True, True, True]), (True, [False, True])])
def test_the_collector_rests_until_the_first_step_or_until_the_run_ends(fails: bool, expected: list[bool]) -> None:
    script = SCRIPT.format(fails=fails)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == expected


def test_a_process_that_has_torch_already_keeps_its_collector_as_it_is() -> None:
    import gc

    import torch  # noqa: F401

    from lora_forge.cli.collector import StartUp

    before = gc.get_freeze_count()
    with StartUp():
        assert gc.isenabled()
    assert gc.get_freeze_count() == before
