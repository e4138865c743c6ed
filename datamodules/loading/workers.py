"""Worker processes of a loader: how they start and end, and what happens when no batch comes (no torch here).

Workers are forked from a server process that has a single thread, never from the training process: a fork of a process
with threads, as those of torch's collectives, can copy a lock that nobody will release.
"""

import atexit
import faulthandler
import logging
import multiprocessing
import os
import signal
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess

from alignvlm_pl.utils.cpu import keep_freed_memory

logger = logging.getLogger(__name__)

START_METHOD = "forkserver"
# What workers need; the server imports it once for all. The processor comes from outside, so it is named here.
_PRELOADED = ["datamodules.loading.loader", "alignvlm_pl.models.processing"]
_SIGNALS = {signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1}
"""Left to the main process, which saves a checkpoint at them; a scheduler sends them to all processes of a job."""

_started: "dict[int, weakref.WeakSet[BaseProcess]]" = {}
"""Process id of a training process -> its workers."""


def start_server() -> None:
    """Start the server that workers are forked from, unless it runs; it imports while this process continues."""
    # Tokenizers must not run threads in forked workers, and warn unless this is set.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    multiprocessing.set_forkserver_preload(_PRELOADED)
    for start in (resource_tracker.ensure_running, forkserver.ensure_running):
        # Each alone: the first one unblocks signals. The server and its workers inherit the mask.
        earlier = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS | {signal.SIGUSR2})
        try:
            start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


@contextmanager
def collect_workers(workers: list[BaseProcess]) -> Iterator[None]:
    """Append the processes that are started inside the block to `workers`."""
    start_server()
    earlier = set(multiprocessing.active_children())
    yield
    workers += [process for process in multiprocessing.active_children() if process not in earlier]
    if os.getpid() not in _started:  # here, not at the import: a rank may be a fork of a process that has imported this
        _started[os.getpid()] = weakref.WeakSet()
        atexit.register(_kill_at_exit, os.getpid())
    _started[os.getpid()].update(workers)


def kill_workers(workers: Sequence[BaseProcess]) -> None:
    """Kill those that still run: they ignore SIGTERM, which DataLoader and multiprocessing send."""
    alive = [worker for worker in workers if worker.is_alive()]
    for worker in alive:
        worker.kill()
    for worker in alive:
        worker.join(timeout=60)


def init_worker(worker: int) -> None:
    """Set a worker up, by its number: keep freed memory, ignore signals, print all stacks at SIGUSR2."""
    keep_freed_memory()
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # in case somebody else has started the server
    # Not sys.stderr: in a notebook, or under a test runner, that is no file of the system.
    faulthandler.register(signal.SIGUSR2, file=sys.__stderr__ or 2, all_threads=True)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})  # before, it would have ended a worker that starts


def _kill_at_exit(main_pid: int) -> None:
    """End the workers before multiprocessing waits for them; not in a process that the main process has forked."""
    if os.getpid() == main_pid:
        kill_workers(list(_started[main_pid]))


@contextmanager
def printing_stacks(seconds: float | None) -> Iterator[None]:
    """Print the stacks of this process whenever the block has taken some seconds more; None: never."""
    if seconds is None:
        yield
        return
    faulthandler.dump_traceback_later(seconds, repeat=True, file=sys.__stderr__ or 2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def print_stacks(waited: float, workers: Sequence[BaseProcess]) -> None:
    """Print the stacks of this process, and of workers that `init_worker` has set up."""
    alive = [worker.pid for worker in workers if worker.is_alive() and worker.pid is not None]
    logger.error(
        "no batch for %.0f s; the stacks of this process and of its %d workers (%s) follow",
        waited,
        len(alive),
        ", ".join(map(str, alive)) or "none alive",
    )
    faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
    for pid in alive:
        os.kill(pid, signal.SIGUSR2)
