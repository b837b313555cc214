"""Searches for good settings of lora-forge with Optuna: the command `lora-forge-sweep`.

It supplies nothing to a run, and is listed among the plugins all the same.
"""

__lora_forge_api__ = 1
