"""Processes that work through a list of tasks, and do not outlive the one that started them."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

from alignvlm_pl.errors import DataError

from .locks import hold_shared

Result = TypeVar("Result")
_job: Callable[..., Any] | None = None
"""What this process does; set once, when it starts."""


def run_jobs(
    job: Callable[..., Result], tasks: Sequence[tuple[Any, ...]], *, workers: int, lock: Path
) -> Generator[Result, None, None]:
    """Yield `job(*task)` for each task, in the order of the tasks.

    Args:
        job: Pickled once into each process.
        tasks: Arguments, small.
        workers: Processes; with 1, or for a single task, everything happens here.
        lock: File that each process keeps locked while it lives.

    Raises:
        DataError: A process was killed, or what the first failing task raised.
    """
    if workers < 2 or len(tasks) < 2:
        for task in tasks:
            yield job(*task)
        return
    # Not forked: a copy of a process with threads, such as that of a progress bar, may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        min(workers, len(tasks)), mp_context=context, initializer=_start, initargs=(job, lock)
    )
    try:
        futures = deque(pool.submit(_run, task) for task in tasks)
        while futures:
            yield futures.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            f"one of {workers} processes was ended from outside, most likely for its memory; run the same command "
            "again, it goes on where it was, with fewer --workers if it happens again"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(job: Callable[..., Any], lock: Path) -> None:
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    hold_shared(lock)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _run(task: tuple[Any, ...]) -> Any:
    if _job is None:
        raise RuntimeError("this process was started without a job")
    return _job(*task)


def _end_with_parent() -> None:
    """End this process when the one that started it ends, however that happens: nobody would wait for its work."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
