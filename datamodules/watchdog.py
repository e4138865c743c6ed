"""A loader that delivers nothing says where it hangs (no torch here)."""

import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

logger = logging.getLogger(__name__)


class Watchdog:
    """Prints the stacks of this process and of its workers when waiting takes too long; the waiting goes on.

    Args:
        seconds: Time after which to print, and again after each such time; None: never.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds

    @contextmanager
    def watch(self, workers: Sequence[BaseProcess]) -> Iterator[None]:
        """Watch what happens inside the block."""
        if self.seconds is None:
            yield
            return
        done = threading.Event()
        thread = threading.Thread(target=self._wait, args=(done, workers), daemon=True, name="watchdog")
        thread.start()
        try:
            yield
        finally:
            done.set()

    def _wait(self, done: threading.Event, workers: Sequence[BaseProcess]) -> None:
        started = time.monotonic()
        while not done.wait(self.seconds):
            waited = time.monotonic() - started
            alive = [worker.pid for worker in workers if worker.is_alive() and worker.pid is not None]
            logger.error(
                "no batch for %.0f s; the stacks of this process and of its %d workers (%s) follow",
                waited,
                len(alive),
                ", ".join(map(str, alive)) or "none alive",
            )
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
            for pid in alive if hasattr(signal, "SIGUSR2") else ():
                os.kill(pid, signal.SIGUSR2)  # CONTRACT: loader.py makes them print theirs
