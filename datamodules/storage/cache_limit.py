"""A size limit for the cache of fetched files: the least recently used are removed, never an open one (no torch).

CONTRACT: `fetching.fetch` writes `.source.json` beside each file, names the file in it, and touches it on each use.
"""

import errno
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from alignvlm_pl.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

RECORD, LOCK = ".source.json", ".lock"
# A process that received a path a moment ago may be about to open it.
GRACE_S = 30.0
_ROOM_LOCK = ".room.lock"


def make_room(cache: Path, *, limit: int, needed: int) -> None:
    """Remove files until another one fits; open files and files being fetched are kept.

    If too much is in use, the limit is exceeded with a warning. Running downloads of other processes are not counted.

    Args:
        cache: Folder of the copies.
        limit: Largest number of bytes of all copies.
        needed: Bytes of the file to come.

    Raises:
        ConfigError: The new file alone is larger than the limit.
    """
    if needed > limit:
        raise ConfigError(
            f"a file of {needed} bytes is larger than the cache may be ({limit} bytes, max_cache_bytes); raise it"
        )
    from filelock import FileLock

    with FileLock(cache / _ROOM_LOCK):
        copies = sorted(_copies(cache))
        total = needed + sum(size for _, size, _ in copies)
        for used, size, path in copies:
            if total <= limit or time.time() - used < GRACE_S:
                break
            if _remove(path):
                total -= size
    if total > limit:
        logger.warning("%s holds %d bytes, more than max_cache_bytes %d: the rest is in use", cache, total, limit)


def open_held(find: Callable[[], Path]) -> BinaryIO:
    """Open a file of the cache under a shared lock, so that `make_room` does not remove it before it is closed.

    Args:
        find: Returns its path, after a download if necessary.

    Raises:
        DataError: It was removed each time before it could be opened.
    """
    import fcntl

    for _ in range(10):
        path = find()
        try:
            stream = path.open("rb")
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(stream, fcntl.LOCK_SH)
        except OSError as error:
            # A file system without locks: an open file can be read to its end even when it has been removed.
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                stream.close()
                raise
        if os.fstat(stream.fileno()).st_nlink:
            return stream
        stream.close()
    raise DataError(f"{path} was removed again and again before it was opened; raise max_cache_bytes")


def _copies(cache: Path) -> list[tuple[float, int, Path]]:
    """Return (time of last use, bytes, path) of all whole copies."""
    found = []
    for record in cache.glob(f"*/{RECORD}"):
        try:
            path = record.with_name(json.loads(record.read_text(encoding="utf-8"))["name"])
            found.append((record.stat().st_mtime, path.stat().st_size, path))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def _remove(path: Path) -> bool:
    import fcntl

    from filelock import FileLock, Timeout

    lock = FileLock(path.with_name(LOCK))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    try:
        with path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            path.with_name(RECORD).unlink(missing_ok=True)
    except OSError:
        return False
    finally:
        lock.release()
    return True
