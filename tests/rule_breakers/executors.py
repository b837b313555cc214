"""Executors that each break one rule."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from lora_forge import ExecutorSpec
from lora_forge.contracts import ExecutorRequest, Worker
from rule_breakers import Breaker


@contextmanager
def open_worker(request: ExecutorRequest) -> Iterator[Worker]:
    worker = request.make_worker()
    try:
        yield worker
    finally:
        worker.close()


def good(request: ExecutorRequest) -> None:
    """In any order: the last task first."""
    with open_worker(request) as worker:
        for task in reversed(request.tasks):
            request.report(worker.save(worker.train(task)))


def pickles_what_was_trained(request: ExecutorRequest) -> None:
    with open_worker(request) as worker:
        for task in request.tasks:
            request.report(worker.save(pickle.loads(pickle.dumps(worker.train(task)))))


def saves_with_another_worker(request: ExecutorRequest) -> None:
    with open_worker(request) as trainer, open_worker(request) as saver:
        for task in request.tasks:
            request.report(saver.save(trainer.train(task)))


def forgets_the_last(request: ExecutorRequest) -> None:
    with open_worker(request) as worker:
        for task in request.tasks[:-1]:
            request.report(worker.save(worker.train(task)))


def reports_twice(request: ExecutorRequest) -> None:
    with open_worker(request) as worker:
        for task in request.tasks:
            outcome = worker.save(worker.train(task))
            request.report(outcome)
        if request.tasks:
            request.report(outcome)


def reports_numbers(request: ExecutorRequest) -> None:
    with open_worker(request) as worker:
        for number, task in enumerate(request.tasks):
            worker.save(worker.train(task))
            request.report(number)


def trains_twice(request: ExecutorRequest) -> None:
    with open_worker(request) as worker:
        for task in request.tasks:
            worker.train(task)
            request.report(worker.save(worker.train(task)))


def wants_several(request: ExecutorRequest) -> None:
    if len(request.tasks) == 1:
        return
    good(request)


def reports_at_once(request: ExecutorRequest) -> None:
    with open_worker(request) as worker, ThreadPoolExecutor(3) as reporting:
        reports = []
        for task in request.tasks:
            outcome = worker.save(worker.train(task))
            reports += [reporting.submit(request.report, outcome)]
            if len(reports) > 1:  # the first one's error still ends the call in time
                reports.pop(0).result()
        for report in reports:
            report.result()


def reports_at_the_end(request: ExecutorRequest) -> None:
    with open_worker(request) as worker:
        for outcome in [worker.save(worker.train(task)) for task in request.tasks]:
            request.report(outcome)


def in_another_process(request: ExecutorRequest) -> None:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(request, here, there))
    process.start()
    there.close()
    with suppress(EOFError):
        while True:
            answer = here.recv()
            if isinstance(answer, Exception):
                process.join()
                raise answer
            try:
                request.report(answer)
            except BaseException:
                here.close()
                process.join()
                raise
            here.send(None)
    process.join()


def _work(request: ExecutorRequest, other_end: Any, pipe: Any) -> None:
    other_end.close()
    with suppress(EOFError, BrokenPipeError):
        try:
            with open_worker(request) as worker:
                for task in request.tasks:
                    pipe.send(worker.save(worker.train(task)))
                    pipe.recv()
        except (EOFError, BrokenPipeError):
            return
        except Exception as error:
            pipe.send(error)


def makes_a_worker_for_each(request: ExecutorRequest) -> None:
    for task in request.tasks:
        with open_worker(request) as worker:
            request.report(worker.save(worker.train(task)))


def trains_on_many_threads(request: ExecutorRequest) -> None:
    with open_worker(request) as worker:
        for task in request.tasks:
            with ThreadPoolExecutor(1) as training:
                request.report(worker.save(training.submit(worker.train, task).result()))


def ends_quietly(request: ExecutorRequest) -> None:
    with suppress(ValueError, OSError):
        good(request)


def ends_with_another_error(request: ExecutorRequest) -> None:
    try:
        good(request)
    except (ValueError, OSError):
        broken = True
    else:
        broken = False
    if broken:
        raise RuntimeError("the job went wrong")


def tries_again(request: ExecutorRequest) -> None:
    with open_worker(request) as worker:
        for task in request.tasks:
            try:
                outcome = worker.save(worker.train(task))
            except ValueError:
                outcome = worker.save(worker.train(task))
            request.report(outcome)


def never_closes(request: ExecutorRequest) -> None:
    worker = request.make_worker()
    for task in request.tasks:
        request.report(worker.save(worker.train(task)))


def closes_when_all_goes_well(request: ExecutorRequest) -> None:
    worker = request.make_worker()
    for task in request.tasks:
        request.report(worker.save(worker.train(task)))
    worker.close()


def closes_too_early(request: ExecutorRequest) -> None:
    with ThreadPoolExecutor(1) as saving, open_worker(request) as worker:
        saves = [saving.submit(_save, request, worker, worker.train(task)) for task in request.tasks[:1]]
        for task in request.tasks[1:]:
            trained = worker.train(task)
            saves[-1].result()
            saves.append(saving.submit(_save, request, worker, trained))
    for save in saves:
        save.result()


def _save(request: ExecutorRequest, worker: Worker, trained: Any) -> None:
    request.report(worker.save(trained))


def closes_elsewhere(request: ExecutorRequest) -> None:
    worker = request.make_worker()
    try:
        for task in request.tasks:
            request.report(worker.save(worker.train(task)))
    finally:
        with ThreadPoolExecutor(1) as closing:
            closing.submit(worker.close).result()


def raises(request: ExecutorRequest) -> None:
    raise ConnectionError("no cluster")


def spec(factory: Callable[..., Any], **settings: Any) -> ExecutorSpec:
    return ExecutorSpec(name="breaker", summary="breaks a rule", factory=factory, **settings)


def breaker(what: str, factory: Callable[..., Any], rule: str, *words: str, **settings: Any) -> Breaker:
    return Breaker(what, spec(factory, **settings), rule, words)


BREAKERS = [
    breaker("pickles what was trained", pickles_what_was_trained, "stays", "sent to another process"),
    breaker("saves with another worker", saves_with_another_worker, "stays", "task 0", "by another worker"),
    breaker("forgets the last task", forgets_the_last, "each_once", "of 7 tasks", "number 6"),
    breaker("reports a task twice", reports_twice, "each_once", "number 6 2 times"),
    breaker("reports something else", reports_numbers, "each_once", "reports a int", "save gave"),
    breaker("trains a task twice", trains_twice, "each_once", "number 0 was given to train 2 times"),
    breaker("does not do a single task", wants_several, "each_once", "of 1 task,", "number 0"),
    breaker("reports several at once", reports_at_once, "one_report", "request.report", "a lock"),
    breaker("reports all at the end", reports_at_the_end, "as_it_comes", "5 seconds", "when it is saved"),
    breaker("is not local", in_another_process, "local", "local=True", "local=False", local=True),
    breaker("makes a worker for each task", makes_a_worker_for_each, "one_worker", "7 workers", "every task"),
    breaker("trains on many threads", trains_on_many_threads, "one_thread", "several threads"),
    breaker("swallows errors", ends_quietly, "errors", "what train raised", "task 3 cannot be", "nobody would hear"),
    breaker("raises another error", ends_with_another_error, "errors", "RuntimeError: the job went wrong", "names it"),
    breaker("tries a task again", tries_again, "errors", "whose train raised", "2 times"),
    breaker("never closes", never_closes, "closes", "0 times;", "in a finally"),
    breaker("closes after success alone", closes_when_all_goes_well, "closes", "0 times, after an error of train"),
    breaker("closes too early", closes_too_early, "closes", "before the last", "after that, save"),
    breaker("closes on another thread", closes_elsewhere, "closes", "another thread"),
    breaker("raises", raises, "runs", "ConnectionError: no cluster", "executors.py, line"),
]
