"""File locks, so that neither a second run nor processes of a killed run write to the same folder.

On file systems without locks, nothing is locked.
"""

import errno
import fcntl
import time
from pathlib import Path
from typing import BinaryIO

from alignvlm_pl.errors import DataError

_PATIENCE_S = 30.0
_held: list[BinaryIO] = []
"""Open files that hold the shared locks of this process."""


def hold_shared(path: Path) -> None:
    """Hold a shared lock on a file until this process ends."""
    _held.append(path.open("ab"))
    _try(_held[-1], fcntl.LOCK_SH)


def acquire(path: Path, *, patience_s: float = 0.0) -> BinaryIO:
    """Acquire an exclusive lock on a file; closing the returned file releases it.

    Args:
        path: The file; created if missing.
        patience_s: How long to wait for others, in seconds.

    Raises:
        DataError: Another process has locked it.
    """
    stream = path.open("ab")
    end = time.monotonic() + patience_s
    while not _try(stream, fcntl.LOCK_EX | fcntl.LOCK_NB):
        if time.monotonic() > end:
            stream.close()
            raise DataError(f"another run is packing into {path.parent.parent}; wait for it or end it first")
        time.sleep(0.05)
    return stream


def wait_for_workers(path: Path) -> None:
    """Wait until no process of a killed run holds its shared lock."""
    acquire(path, patience_s=_PATIENCE_S).close()


def _try(stream: BinaryIO, operation: int) -> bool:
    try:
        fcntl.flock(stream, operation)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True
