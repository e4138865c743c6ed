"""Finds worker processes that hang before they run a line (no torch here).

A process that is forked while another thread enters the interpreter, as those of torch's collectives do, may wait for a
lock for ever (python/cpython#112275; Python 3.12 and late releases of 3.11 do not), most likely on a busy machine.
"""

import multiprocessing
import os
import time
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext

START_SECONDS = 30.0
"""Longer than a start takes, however busy the machine is; where it is not, the workers are started once more."""
ATTEMPTS = 3


def forks(context: BaseContext | None) -> bool:
    """Whether workers are forked; None is the platform's default."""
    return (context or multiprocessing).get_start_method() == "fork"


class RollCall:
    """A pipe that each forked worker writes a byte to."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()

    def answer(self) -> None:
        """Say that this worker runs."""
        os.write(self._writer, b".")
        self._close()

    def complete(self, workers: int, *, seconds: float) -> bool:
        """Wait for the answers of all workers, once; False where one is missing after that time.

        One that has ended is not missing: the DataLoader tells of it.
        """
        os.close(self._writer)
        self._writer = -1
        end, answers = time.monotonic() + seconds, 0
        while answers < workers:
            if not wait([self._reader], max(end - time.monotonic(), 0.0)):
                break
            read = len(os.read(self._reader, workers))
            answers = answers + read if read else workers
        self._close()
        return answers >= workers

    def _close(self) -> None:
        for end in (self._reader, self._writer):
            if end >= 0:
                os.close(end)
