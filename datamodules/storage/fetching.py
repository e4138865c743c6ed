"""One file of a set from its URL into the cache, whole or not at all (no torch here).

Every URL has a folder of its own in the cache, named by the sha256 of the full URL: two sources whose files have
equal names never meet. A file is written under another name, checked, and renamed; what a killed process leaves is
never taken for a shard.
"""

import errno
import hashlib
import json
import logging
import os
import random
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from uuid import uuid4

from alignvlm_pl.errors import DataError
from alignvlm_pl.utils.atomic_files import PARTIAL, replace_path

from .cache_limit import LOCK, RECORD, make_room
from .transfer import TransferError, shown, transfer

logger = logging.getLogger(__name__)

# Far above any sensible shard: only so that a server cannot fill a disk where the size is not known.
MAX_BYTES = 256 << 30
MAX_BACKOFF_S = 60.0
STALE_PARTIAL_S = 86400.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """How hard one file is tried for.

    Attributes:
        retries: Further attempts after the first that failed.
        timeout_s: Seconds without a single byte after which an attempt has failed.
        backoff_s: Seconds before the first retry, about; they double with each, up to a minute.
    """

    retries: int = 5
    timeout_s: float = 60.0
    backoff_s: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Wanted:
    bytes: int | None
    sha256: str
    tag: str
    limit: int

    @property
    def largest(self) -> int:
        """Bytes after which a download is broken off."""
        return self.limit if self.bytes is None else self.bytes


def fetch(
    url: str,
    *,
    cache: Path,
    expected_bytes: int | None = None,
    expected_sha256: str = "",
    max_bytes: int = MAX_BYTES,
    tag: str = "",
    name: str | None = None,
    max_cache_bytes: int | None = None,
    policy: Policy | None = None,
) -> Path:
    """Return the local copy of a file, downloading it where the cache does not hold the wanted one.

    Several processes of one machine that ask for the same file wait for the first. A copy whose size, checksum or tag
    is not the wanted one is fetched again; the checksum of a copy is computed once, when it arrives.

    Args:
        url: An address that `storage.locate` has passed, or ``pipe:`` and a command.
        cache: Folder of the copies; made where it is missing.
        expected_bytes: Size of the file; None where it is not known.
        expected_sha256: Its checksum; empty where it is not known.
        max_bytes: Largest size that is accepted where the size is not known.
        tag: What the file belongs to, where nothing else tells a newer one from an older.
        name: Its base name in the cache; None: the last part of the URL.
        max_cache_bytes: Where the cache would grow larger, others are removed first; None: no limit. Then open the
            file with `cache_limit.open_held`, or within half a minute.
        policy: Retries and waiting times.

    Raises:
        MissingFileError: There is no such file.
        DataError: It cannot be fetched, is not the expected one, or the cache cannot hold it.
        ConfigError: It alone is larger than the cache may be.
    """
    target = cache_path(url, cache=cache, name=name)
    wanted = _Wanted(bytes=expected_bytes, sha256=expected_sha256, tag=tag, limit=max_bytes)
    if _is_cached(target, wanted):
        with suppress(OSError):  # a cache that others only read
            os.utime(target.with_name(RECORD))
        return target
    with _locked(target.parent, url):
        if not _is_cached(target, wanted):
            _clear(target)
            if max_cache_bytes is not None:
                with _storing(target.parent, url):
                    make_room(Path(cache), limit=max_cache_bytes, needed=expected_bytes or 0)
            _check_space(target.parent, url, wanted)
            _attempt(url, target, wanted, policy or Policy())
    return target


def fetch_small(url: str, *, cache: Path, max_bytes: int, policy: Policy | None = None) -> bytes:
    """Return the content of a small file, fresh from its source each time; nothing stays in the cache.

    Raises:
        MissingFileError: There is no such file.
        DataError: It cannot be fetched, or is larger than `max_bytes`.
    """
    folder = cache_path(url, cache=cache).parent
    wanted = _Wanted(bytes=None, sha256="", tag="", limit=max_bytes)
    with _storing(folder, url):
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
    content = folder / f".{_own_suffix()}{PARTIAL}"
    try:
        _attempt(url, content, wanted, policy or Policy(), keep_record=False)
        return content.read_bytes()
    finally:
        content.unlink(missing_ok=True)


def cache_path(url: str, *, cache: Path, name: str | None = None) -> Path:
    """Return where the copy of a file lies, whether it is there or not."""
    # CONTRACT: the key is the full URL with its query, so a signed URL that changes is another file.
    key = hashlib.sha256(url.encode("utf-8", "surrogateescape")).hexdigest()
    base = name or unquote(urlsplit(url).path)
    safe = re.sub(r"[^A-Za-z0-9._+=@-]", "_", base.rstrip("/").rpartition("/")[2])[-200:].lstrip(".")
    return Path(cache) / key / (safe or "file")


def _is_cached(target: Path, wanted: _Wanted) -> bool:
    try:
        record = json.loads((target.parent / RECORD).read_text(encoding="utf-8"))
        size = target.stat().st_size
    except (OSError, ValueError):
        return False
    return (
        isinstance(record, dict)
        and size == record.get("bytes")
        and wanted.bytes in (None, size)
        and wanted.sha256 in ("", record.get("sha256"))
        and wanted.tag == record.get("tag")
    )


@contextmanager
def _locked(folder: Path, url: str) -> Iterator[None]:
    """Hold the folder of a URL against the other processes of this machine; the lock of a dead one is free."""
    from filelock import FileLock

    with _storing(folder, url):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _clear(target: Path) -> None:
    """Remove an outdated copy and what killed processes left; the lock is held."""
    # The copy first: a record without its file is no copy, a file beside another's record would be one.
    target.unlink(missing_ok=True)
    (target.parent / RECORD).unlink(missing_ok=True)
    # Nobody else on this machine writes here, so what bears its name is left over.
    _sweep(target.parent, of_host=_host())


def _sweep(folder: Path, *, of_host: str | None = None) -> None:
    """Remove partial files that are a day old, and those of one machine."""
    for left in folder.glob(f".*{PARTIAL}"):
        try:
            ours = of_host is not None and left.name.startswith(f".{of_host}-")
            if ours or time.time() - left.stat().st_mtime > STALE_PARTIAL_S:
                left.unlink()
        except OSError:
            continue


def _attempt(url: str, target: Path, wanted: _Wanted, policy: Policy, *, keep_record: bool = True) -> None:
    reason = ""
    for attempt in range(policy.retries + 1):
        if attempt:
            wait = min(policy.backoff_s * 2 ** (attempt - 1), MAX_BACKOFF_S)
            logger.warning("%s: %s; attempt %d in %.1f s", shown(url), reason, attempt + 1, wait)
            # Not the global generator: a retry must not change the order of the samples.
            time.sleep(wait * random.Random().uniform(0.75, 1.25))
        partial = _partial_path(target.parent)
        try:
            with _storing(target.parent, url):
                transfer(url, partial, limit=wanted.largest, timeout_s=policy.timeout_s)
                record = _checked(partial, url, wanted)
                if keep_record:
                    _write_record(target.parent, record | {"name": target.name})
                replace_path(partial, target)
            return
        except TransferError as error:
            reason = str(error)
        finally:
            partial.unlink(missing_ok=True)
    raise DataError(
        f"{shown(url)} could not be fetched in {policy.retries + 1} attempts, the last: {reason}; "
        "see whether the server answers, then start again"
    )


def _checked(partial: Path, url: str, wanted: _Wanted) -> dict[str, Any]:
    """Compare what came with what was wanted, and put it on the disk.

    Raises:
        TransferError: It is shorter: the connection may have been cut.
        DataError: It is another file; a retry would not help.
    """
    size = partial.stat().st_size
    if wanted.bytes is not None and size < wanted.bytes:
        raise TransferError(f"expected {wanted.bytes} bytes, came {size}")
    digest = hashlib.sha256()
    with partial.open("rb+") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    found = digest.hexdigest()
    if wanted.sha256 and found != wanted.sha256:
        raise DataError(
            f"{shown(url)} is damaged or another file: expected sha256 {wanted.sha256[:16]}…, found {found[:16]}…; "
            "the set has changed at its source: fetch its manifest again, or tell who publishes it"
        )
    return {"url": shown(url), "bytes": size, "sha256": found, "tag": wanted.tag}


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    partial = _partial_path(folder)
    try:
        partial.write_text(json.dumps(record) + "\n", encoding="utf-8")
        replace_path(partial, folder / RECORD)
    finally:
        partial.unlink(missing_ok=True)


def _check_space(folder: Path, url: str, wanted: _Wanted) -> None:
    free = shutil.disk_usage(folder).free
    if wanted.bytes is not None and wanted.bytes > free:
        raise DataError(
            f"{shown(url)} has {wanted.bytes} bytes but {folder.parent} has {free} free: the disk is full; "
            "free space or choose another cache"
        )


@contextmanager
def _storing(folder: Path, url: str) -> Iterator[None]:
    """Turn what the file system refuses into errors that name the cache."""
    try:
        yield
    except OSError as error:
        full = "the disk is full, " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise DataError(
            f"{shown(url)} cannot be stored in {folder.parent}: {full}{error.strerror or error}; "
            "free space or choose another cache"
        ) from error


def _partial_path(folder: Path) -> Path:
    return folder / f".{_own_suffix()}{PARTIAL}"


def _own_suffix() -> str:
    return f"{_host()}-{os.getpid()}-{uuid4().hex[:8]}"


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())[:64]
