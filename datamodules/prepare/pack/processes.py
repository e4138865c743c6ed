"""A job over many tasks, in processes that end with this one."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing.connection import wait
from typing import Any, TypeVar

from alignvlm_pl.errors import DataError

Result = TypeVar("Result")
_AHEAD = 2
"""Tasks of each process that are given out before the first result is taken; what they hold is in memory."""
_job: Callable[[Any], Any] | None = None
"""The job of this worker process, set when it starts."""


def run_jobs(job: Callable[[Any], Result], tasks: Iterable[Any], *, workers: int) -> Generator[Result, None, None]:
    """Yield `job(task)` for each task, in the order of the tasks, which are read as they are needed.

    The job is pickled once into each process. With one worker, or for a single task, there are no processes.

    Raises:
        DataError: A process was killed; else what the first failing task raises.
    """
    tasks = iter(tasks)
    first = list(islice(tasks, 2))
    tasks = chain(first, tasks)
    if workers < 2 or len(first) < 2:
        yield from map(job, tasks)
        return
    # Not forked: a copy of a process with threads, such as that of a progress bar, may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(job,))
    waiting: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(_run, task))
            if len(waiting) > _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            f"one of {workers} processes was killed, most likely for its memory; run the same command again, with "
            "fewer processes if it happens again"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start(job: Callable[[Any], Any]) -> None:
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _run(task: Any) -> Any:
    assert _job is not None  # set by _start
    return _job(task)


def _end_with_parent() -> None:
    """Exit when the parent process ends, whatever the reason: nobody would wait for the result."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
