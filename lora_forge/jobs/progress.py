"""How far a job is: counted, and written to the manifest, as outcomes come in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lora_forge.jobs.folder import entries_of
from lora_forge.jobs.manifest import Manifest
from lora_forge.jobs.tasks import Prepared
from lora_forge.plan import short_digest

if TYPE_CHECKING:
    from lora_forge.jobs.worker import Outcome

Line = Mapping[str, Any]


@dataclass(frozen=True)
class JobState:
    """How far a job is, in prompts.

    earlier: made before this time; made: all that are, those among them. failed: all that did, rows that are no prompt
    among them. twice: rows that repeat another. halved: memory ran out, so that some batches were smaller.
    """

    prompts: int
    earlier: int
    made: int
    failed: int
    twice: int
    batch_size: int
    halved: bool = False

    @property
    def left(self) -> int:
        """Prompts that are neither made nor failed."""
        return self.prompts - self.made - self.failed


Watch = Callable[[JobState, Sequence[Line]], None]  # called with the state, and the manifest's lines that led to it


class Reporter:
    """Writes outcomes to the manifest and tells whoever watches."""

    def __init__(
        self,
        manifest: Manifest,
        watch: Watch,
        prepared: Prepared,
        made: Collection[str],
        failed: Collection[str],
        batch_size: int,
    ) -> None:
        stems = {entry.stem for entry in entries_of(prepared)}
        earlier = len(stems & set(made))
        self._manifest, self._watch = manifest, watch
        self.state = JobState(
            prompts=len(stems) + len(prepared.refused),
            earlier=earlier,
            made=earlier,
            failed=len(stems & set(failed)),
            twice=prepared.twice,
            batch_size=batch_size,
        )
        self._refuse(prepared)

    def _refuse(self, prepared: Prepared) -> None:
        """Rows that are no prompt are failures from the start; the manifest is told once."""
        lines = []
        for row, why in prepared.refused:
            told = {"row": row.number, "prompt": row.prompt, "error": why}
            id = f"#{short_digest(told)}"  # what the row was; when it is mended, it is another
            if id not in self._manifest.rows:
                lines.append({"id": id, **told})
        if lines:
            self._manifest.add(lines)
        self.state = replace(self.state, failed=self.state.failed + len(prepared.refused))
        self._watch(self.state, lines)

    def report(self, outcome: Outcome) -> None:
        """Note a task's outcome."""
        if outcome.lines:
            self._manifest.add(outcome.lines)
        failed = sum(line["error"] is not None for line in outcome.lines)
        self.state = replace(
            self.state,
            made=self.state.made + len(outcome.lines) - failed,
            failed=self.state.failed + failed,
            halved=self.state.halved or outcome.halved,
        )
        self._watch(self.state, outcome.lines)
