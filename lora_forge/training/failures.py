"""Which prompts of a batch have failed; the others go on."""

from __future__ import annotations

from lora_forge.errors import RunFailed


class Failures:
    """Why each prompt of a batch failed, if it did. Once all have, there is nothing left to go on for."""

    def __init__(self, prompts: int) -> None:
        self._of: list[RunFailed | None] = [None] * prompts

    def __getitem__(self, prompt: int) -> RunFailed | None:
        return self._of[prompt]

    def add(self, prompt: int, error: RunFailed) -> None:
        """Note a prompt's failure, of which the first counts. Raises the batch's first when all prompts have failed."""
        self._of[prompt] = self._of[prompt] or error
        if all(self._of):
            raise next(filter(None, self._of))
