"""The most memory that training took, where that can be known: of a CUDA device, or of this process on Linux."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lora_forge.output import Place, appearing

_NAME = "peak_memory.json"
_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_RESET_PEAK = "5"  # Documentation/filesystems/proc.rst of Linux: VmHWM becomes what is resident now
_PEAK = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)


class PeakMemory:
    """Bytes, from here to `read`: allocated by PyTorch on a CUDA device, or resident of this process."""

    def __init__(self, device: str) -> None:
        from lora_forge.jobs.memory import release_memory

        self._device = device
        self._known = True
        release_memory()  # what an earlier objective left is not this one's
        if device.startswith("cuda"):
            import torch

            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            _CLEAR.write_text(_RESET_PEAK)
        except OSError:  # another system, or a container that does not allow it
            self._known = False

    def read(self) -> int | None:
        """None where it cannot be known."""
        if self._device.startswith("cuda"):
            import torch

            return int(torch.cuda.max_memory_allocated(self._device))
        found = _PEAK.search(_STATUS.read_text()) if self._known else None
        return int(found.group(1)) * 1024 if found else None


def kept_peak(folder: Place) -> int | None:
    """What `keep_peak` wrote in a folder, by an earlier process perhaps."""
    try:
        value: Any = json.loads((folder / _NAME).read_text(encoding="utf-8"))
        return int(value["bytes"])
    except Exception:  # it is not there, or was never whole: the number is one of many, and no LoRA's
        return None


def keep_peak(folder: Place, peak: int | None) -> None:
    """Write the largest so far beside the LoRAs. Raises OutputError."""
    earlier = kept_peak(folder)
    if peak is not None and peak > (earlier or 0):
        with appearing(folder / _NAME, overwrite=True) as temporary:
            temporary.write_text(json.dumps({"bytes": peak}), encoding="utf-8")
