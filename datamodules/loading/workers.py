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

    Its thread lives from the first wait until `stop`: one for each wait would cost more than most waits do.

    Args:
        seconds: Time after which to print, and again after each such time; None: never.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._wait: tuple[float, Sequence[BaseProcess]] | None = None
        self._stopped: threading.Event | None = None

    @contextmanager
    def watch(self, workers: Sequence[BaseProcess]) -> Iterator[None]:
        """Watch what happens inside the block."""
        if self.seconds is not None and self._stopped is None:
            self._stopped = threading.Event()
            arguments = (self.seconds, self._stopped)
            threading.Thread(target=self._look, args=arguments, daemon=True, name="watchdog").start()
        self._wait = time.monotonic(), workers
        try:
            yield
        finally:
            self._wait = None

    def stop(self) -> None:
        """End the thread; the next wait starts another."""
        if self._stopped is not None:
            self._stopped.set()
            self._stopped = None

    def _look(self, seconds: float, stopped: threading.Event) -> None:
        """Look at the wait that goes on, a few times in each period."""
        seen, printed = None, 0
        while not stopped.wait(seconds / 5):
            wait = self._wait
            if wait is None:
                continue
            if wait is not seen:
                seen, printed = wait, 0
            waited = time.monotonic() - wait[0]
            if waited >= seconds * (printed + 1):
                printed += 1
                _print_stacks(waited, wait[1])


def _print_stacks(waited: float, workers: Sequence[BaseProcess]) -> None:
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
