"""`python -m lora_forge` is `lora-forge`."""

from lora_forge.cli.main import main

raise SystemExit(main())
