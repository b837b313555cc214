"""Examining an executor, with workers that train nothing and write down what is asked of them, and on which thread.

They write to a temporary folder, so that they can be in other processes; those have to be on this machine.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_forge.contracts import ExecutorRequest
from lora_forge.records import ExecutorSpec
from lora_forge.testing.examination import Book, Broken, in_words

_MANY = 7  # tasks
_WORK = 0.01  # seconds that each thing takes, so that what overlaps is seen to
_PATIENCE = 5.0  # seconds until an outcome that is not reported counts as held back
_STAYS = "what a worker's train gave was sent to another process"

_threads = itertools.count()
_here = threading.local()


@dataclass(frozen=True)
class _Script:
    """What workers have to know. fails: what is to raise, `train` or `save`, for the task number `at`."""

    folder: Path
    tasks: int
    fails: str = ""
    at: int = 3

    @property
    def words(self) -> str:
        return f"task {self.at} cannot be handled by {self.fails}"

    def check(self, what: str, number: int) -> None:
        if (what, number) == (self.fails, self.at):
            raise ValueError(self.words)


@dataclass(frozen=True)
class _Task:
    number: int


@dataclass(frozen=True)
class _Outcome:
    number: int
    worker: str


class _Trained:
    def __init__(self, number: int, worker: str) -> None:
        self.number, self.worker = number, worker

    def __reduce__(self) -> Any:
        raise TypeError(_STAYS)


class RecordingWorker:
    """A worker without a model, which writes each thing that is asked of it to a file of its own."""

    def __init__(self, script: _Script) -> None:
        self.name = f"{os.getpid()}-{uuid.uuid4().hex}"
        self._script, self._lock = script, threading.Lock()
        self._note("made")

    def train(self, task: _Task, /) -> _Trained:
        with self._noted("train", task.number):
            (self._script.folder / f"begun-{task.number}").touch()
            self._script.check("train", task.number)
            if len([*self._script.folder.glob("begun-*")]) == self._script.tasks > 1:
                self._await_a_report()
            return _Trained(task.number, self.name)

    def save(self, trained: _Trained, /) -> _Outcome:
        with self._noted("save" if trained.worker == self.name else "save of another's", trained.number):
            self._script.check("save", trained.number)
            return _Outcome(trained.number, self.name)

    def close(self) -> None:
        with self._noted("close"):
            pass

    def _await_a_report(self) -> None:
        """The last task to begin ends when something was reported: a job stopped here would lose no other."""
        patience = time.monotonic() + _PATIENCE
        while not self._script.fails and not (self._script.folder / "reported").exists():
            if time.monotonic() > patience:
                (self._script.folder / "in vain").touch()
                return
            time.sleep(0.005)

    @contextmanager
    def _noted(self, what: str, number: int = -1) -> Iterator[None]:
        self._note(f"{what} begins", number)
        try:
            time.sleep(_WORK)
            yield
        finally:
            self._note(f"{what} ends", number)

    def _note(self, what: str, number: int = -1) -> None:
        if not hasattr(_here, "thread"):  # the system's numbers are used again
            _here.thread = next(_threads)
        with self._lock, (self._script.folder / f"{self.name}.worker").open("a") as file:
            file.write(json.dumps([what, number, _here.thread]) + "\n")


@dataclass(frozen=True)
class _Record:
    """What one worker wrote: `(what, task number, thread)`, in order."""

    process: int
    events: list[tuple[str, int, int]]

    def places(self, *whats: str) -> list[int]:
        return [place for place, event in enumerate(self.events) if event[0] in whats]

    def numbers(self, *whats: str) -> list[int]:
        return [self.events[place][1] for place in self.places(*whats)]


@dataclass
class _Call:
    """One call of the executor: what it reported, what it raised, and what its workers wrote."""

    script: _Script
    fails_to_report: bool = False
    outcomes: list[Any] = field(default_factory=list)
    at_once: int = 0
    error: BaseException | None = None
    workers: list[_Record] = field(default_factory=list)

    def make(self, executor: Callable[[ExecutorRequest], Any]) -> None:
        tasks = tuple(_Task(number) for number in range(self.script.tasks))
        make_worker = functools.partial(RecordingWorker, self.script)
        lock = threading.Lock()

        def report(outcome: Any) -> None:
            alone = lock.acquire(blocking=False)
            self.at_once += not alone
            (self.script.folder / "reported").touch()
            time.sleep(3 * _WORK)  # longer than the next task takes
            self.outcomes.append(outcome)
            if alone:
                lock.release()
            if self.fails_to_report:
                raise OSError("no room for a report")

        try:
            executor(ExecutorRequest(make_worker, tasks, report, threads=1))
        except (Exception, SystemExit) as error:
            self.error = error
        for path in sorted(self.script.folder.glob("*.worker")):
            events = [tuple(json.loads(line)) for line in path.read_text().splitlines()]
            self.workers.append(_Record(int(path.name.partition("-")[0]), events))


def examine_executor(book: Book, spec: ExecutorSpec, options: Any, make: Callable[[], Callable[..., Any]]) -> None:
    """See `lora_forge.testing.RULES`."""
    with tempfile.TemporaryDirectory(prefix="lora-forge-") as folder:
        exam = _Exam(spec, make, Path(folder))
        call = exam.call(_MANY)
        with book.rule("stays", vital=True):
            _check_stays(call)
        with book.rule("each_once", vital=True):
            for each in (call, exam.call(0), exam.call(1)):
                _check_each_once(each)
        with book.rule("one_report"):
            _check_one_report(call)
        with book.rule("as_it_comes"):
            _check_as_it_comes(call)
        with book.rule("local"):
            exam.check_local(call)
        with book.rule("one_worker", vital=True):
            _check_one_worker(call)
        with book.rule("one_thread", vital=True):
            _check_one_thread(call)
        failed = {what: exam.call(_MANY, fails=what) for what in ("train", "save", "report")}
        with book.rule("errors"):
            for what, each in failed.items():
                _check_error(what, each)
        with book.rule("closes"):
            for what, each in {"": call, **failed}.items():
                _check_closes(each, f", after an error of {what}" if what else "")


class _Exam:
    def __init__(self, spec: ExecutorSpec, make: Callable[[], Callable[..., Any]], folder: Path) -> None:
        self.spec, self.make, self.folder = spec, make, folder

    def call(self, tasks: int, fails: str = "") -> _Call:
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        call = _Call(_Script(folder, tasks, fails), fails_to_report=fails == "report")
        call.make(self.make())
        return call

    def check_local(self, call: _Call) -> None:
        elsewhere = [worker for worker in call.workers if worker.process != os.getpid()]
        if self.spec.local and elsewhere:
            raise Broken(
                "it is declared local=True, but has workers in other processes, whose memory nobody has asked about: "
                "declare local=False, or call request.make_worker() in the process that called"
            )


def _check_stays(call: _Call) -> None:
    if call.error and _STAYS in _chain(call.error):
        raise Broken(f"{_STAYS}; have the worker save it there, and send the outcome of save")
    if strange := [number for worker in call.workers for number in worker.numbers("save of another's begins")]:
        raise Broken(f"what one worker's train gave for task {strange[0]} was saved by another worker")


def _check_each_once(call: _Call) -> None:
    if call.error:
        raise call.error
    expected = set(range(call.script.tasks))
    if strange := [outcome for outcome in call.outcomes if not isinstance(outcome, _Outcome)]:
        raise Broken(f"it reports a {type(strange[0]).__name__} instead of what a worker's save gave")
    reported = Counter(outcome.number for outcome in call.outcomes)
    of = f"of {call.script.tasks} task{'s' * (call.script.tasks != 1)}"
    if lost := sorted(expected - reported.keys()):
        raise Broken(f"{of}, it returned without a report of number {lost[0]}; report each, in the process that called")
    if twice := [number for number, count in reported.items() if count > 1]:
        raise Broken(f"{of}, it reported number {twice[0]} {reported[twice[0]]} times")
    for what in ("train", "save"):
        done = Counter(number for worker in call.workers for number in worker.numbers(f"{what} begins"))
        if wrong := [number for number in expected if done[number] != 1]:
            raise Broken(f"{of}, number {wrong[0]} was given to {what} {done[wrong[0]]} times, without a worker lost")


def _check_one_report(call: _Call) -> None:
    if call.at_once:
        raise Broken("it calls request.report while an earlier call has not returned; use one thread, or a lock")


def _check_as_it_comes(call: _Call) -> None:
    if (call.script.folder / "in vain").exists():
        raise Broken(
            f"it held outcomes back: the last of {_MANY} tasks waited {_PATIENCE:g} seconds for a report of any other; "
            "save each task before the worker has trained two more, and report it when it is saved"
        )


def _check_one_worker(call: _Call) -> None:
    processes = Counter(worker.process for worker in call.workers)
    if several := [count for count in processes.values() if count > 1]:
        raise Broken(
            f"one process made {several[0]} workers, each of which loads the model; make one and give it every task"
        )


def _check_one_thread(call: _Call) -> None:
    for worker in call.workers:
        if len({thread for what, _, thread in worker.events if what == "train begins"}) > 1:
            raise Broken("a worker's train is called on several threads; keep it to one")
        begins_and_ends = [worker.events[place][0] for place in worker.places("train begins", "train ends")]
        if "train begins" in begins_and_ends[1::2]:
            raise Broken("a worker's train is called while it has another task; one at a time")


def _check_error(what: str, call: _Call) -> None:
    words = "no room for a report" if what == "report" else call.script.words
    if call.error is None:
        raise Broken(f"what {what} raised ({words}) did not end the call; nobody would hear of it")
    if words not in _chain(call.error):
        raise Broken(
            f"what {what} raised ({words}) ended the call with another error, {in_words(call.error)}; raise that, or "
            "one that names it"
        )
    tries = Counter(number for worker in call.workers for number in worker.numbers("train begins"))
    if what != "report" and tries[call.script.at] > 1:
        raise Broken(f"a task whose {what} raised was given to train {tries[call.script.at]} times; only a lost one is")


def _check_closes(call: _Call, when: str) -> None:
    for worker in call.workers:
        closes = worker.places("close begins")
        if len(closes) != 1:
            raise Broken(f"it closed a worker {len(closes)} times{when}; once, in a finally")
        later = [what for what, _, _ in worker.events[closes[0] :] if not what.startswith("close")]
        if later:
            raise Broken(f"it closed a worker before the last of its tasks was done{when}: after that, {later[0]}")
        threads = {thread for what, _, thread in worker.events if what in ("train begins", "close begins")}
        if len(threads) > 1:
            raise Broken(f"it closed a worker on another thread than that of train{when}")


def _chain(error: BaseException | None) -> str:
    """The text of an error and of what it came from."""
    texts = []
    while error:
        texts.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(texts)
