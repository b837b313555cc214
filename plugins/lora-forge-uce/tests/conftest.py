"""An environment in which nothing is downloaded and nobody else's plugins matter."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["LORA_FORGE_PLUGINS"] = "lora-forge-uce"
