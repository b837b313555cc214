"""`python -m lora_forge_optuna` is `lora-forge-sweep`."""

import sys

from lora_forge_optuna.cli import main

if __name__ == "__main__":
    sys.exit(main())
