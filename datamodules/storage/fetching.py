"""Fetch one file of a dataset from its URL into the cache, complete or not at all (no torch here).

Every URL has its own folder in the cache, named by the sha256 of the full URL, so equal file names never collide.
A file is written under another name, checked, and renamed, so a partial file is never taken for a shard.
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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from uuid import uuid4

from alignvlm_pl.errors import DataError
from alignvlm_pl.utils.atomic_files import PARTIAL, replace_path

from .transfer import TransferError, redact, transfer

logger = logging.getLogger(__name__)

RECORD, LOCK = ".source.json", ".lock"
# Far above any shard; keeps a server from filling the disk if the size is not known.
MAX_BYTES = 256 << 30
MAX_BACKOFF_S = 60.0
STALE_PARTIAL_S = 86400.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """Retries and timeouts for one file.

    Attributes:
        retries: Attempts after the first one.
        timeout_s: Seconds without a byte after which an attempt fails.
        backoff_s: Approximate seconds before the first retry; doubled for each further one, up to a minute.
    """

    retries: int = 5
    timeout_s: float = 60.0
    backoff_s: float = 1.0

    def wait(self, what: str, reason: object, attempt: int) -> None:
        """Log why attempt number `attempt` (from 1) has failed, and sleep before the next one."""
        wait_s = min(self.backoff_s * 2 ** (attempt - 1), MAX_BACKOFF_S)
        logger.warning("%s: %s; attempt %d in %.1f s", what, reason, attempt + 1, wait_s)
        # Not the global generator: a retry must not change the order of the samples.
        time.sleep(wait_s * random.Random().uniform(0.75, 1.25))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Expected:
    bytes: int | None
    sha256: str
    tag: str
    limit: int

    @property
    def largest(self) -> int:
        """Bytes after which a download is aborted."""
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
    policy: Policy | None = None,
) -> Path:
    """Return the local copy of a file, downloading it where the cache does not hold the expected one.

    Several processes of one machine that ask for the same file wait for the first. A copy whose size, checksum or tag
    is not the expected one is fetched again; the checksum of a copy is computed once, when it arrives.

    Args:
        url: An address that `Storage.locate` has passed.
        cache: Folder of the copies; created if missing.
        expected_bytes: Size of the file; None if unknown.
        expected_sha256: Its checksum; empty if unknown.
        max_bytes: Largest accepted size if the size is unknown.
        tag: Version of the file; a copy with another tag is fetched again.
        name: Its base name in the cache; None: the last part of the URL.
        policy: Retries and waiting times.

    Raises:
        MissingFileError: There is no such file.
        DataError: It cannot be fetched, is not the expected one, or the cache cannot hold it.
    """
    target = cache_path(url, cache=cache, name=name)
    expected = _Expected(bytes=expected_bytes, sha256=expected_sha256, tag=tag, limit=max_bytes)
    if _is_cached(target, expected):
        return target
    with _locked(target.parent, url):
        if not _is_cached(target, expected):
            _clear(target)
            _check_space(target.parent, url, expected)
            _attempt(url, target, expected, policy or Policy())
    return target


def fetch_small(url: str, *, cache: Path, max_bytes: int, policy: Policy | None = None) -> bytes:
    """Return the content of a small file, fresh from its source each time; nothing stays in the cache.

    Raises:
        MissingFileError: There is no such file.
        DataError: It cannot be fetched, or is larger than `max_bytes`.
    """
    folder = cache_path(url, cache=cache).parent
    expected = _Expected(bytes=None, sha256="", tag="", limit=max_bytes)
    with _storing(folder, url):
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
    content = _partial_path(folder)
    try:
        _attempt(url, content, expected, policy or Policy(), keep_record=False)
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


def _is_cached(target: Path, expected: _Expected) -> bool:
    try:
        record = json.loads((target.parent / RECORD).read_text(encoding="utf-8"))
        size = target.stat().st_size
    except (OSError, ValueError):
        return False
    return (
        isinstance(record, dict)
        and size == record.get("bytes")
        and expected.bytes in (None, size)
        and expected.sha256 in ("", record.get("sha256"))
        and expected.tag == record.get("tag")
    )


@contextmanager
def _locked(folder: Path, url: str) -> Iterator[None]:
    """Lock the folder of a URL against other processes of this machine; a dead process holds no lock."""
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
    """Remove an outdated copy and partial files of killed processes; the caller holds the lock."""
    # The copy first: a record without its file is no copy, a file beside another's record would be one.
    target.unlink(missing_ok=True)
    (target.parent / RECORD).unlink(missing_ok=True)
    # No other process of this machine writes here now, so its partial files are leftovers.
    _sweep(target.parent, of_host=_host())


def _sweep(folder: Path, *, of_host: str | None = None) -> None:
    """Remove partial files older than a day, and all of host `of_host`."""
    for left in folder.glob(f".*{PARTIAL}"):
        try:
            ours = of_host is not None and left.name.startswith(f".{of_host}-")
            if ours or time.time() - left.stat().st_mtime > STALE_PARTIAL_S:
                left.unlink()
        except OSError:
            continue


def _attempt(url: str, target: Path, expected: _Expected, policy: Policy, *, keep_record: bool = True) -> None:
    reason = ""
    for attempt in range(policy.retries + 1):
        if attempt:
            policy.wait(redact(url), reason, attempt)
        partial = _partial_path(target.parent)
        try:
            with _storing(target.parent, url):
                transfer(url, partial, limit=expected.largest, timeout_s=policy.timeout_s)
                record = _checked(partial, url, expected)
                if keep_record:
                    _write_record(target.parent, record)
                replace_path(partial, target)
            return
        except TransferError as error:
            reason = str(error)
        finally:
            partial.unlink(missing_ok=True)
    raise DataError(
        f"{redact(url)} could not be fetched in {policy.retries + 1} attempts, the last: {reason}; "
        "check that the server responds, then start again"
    )


def _checked(partial: Path, url: str, expected: _Expected) -> dict[str, Any]:
    """Check size and sha256 of a download and flush it to the disk; returns the record of the copy.

    Raises:
        TransferError: It is too short: the connection may have been cut.
        DataError: It is another file; a retry would not help.
    """
    size = partial.stat().st_size
    if expected.bytes is not None and size < expected.bytes:
        raise TransferError(f"expected {expected.bytes} bytes, received {size}")
    digest = hashlib.sha256()
    with partial.open("rb+") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    found = digest.hexdigest()
    if expected.sha256 and found != expected.sha256:
        raise DataError(
            f"{redact(url)} is damaged or another file: expected sha256 {expected.sha256[:16]}…, found {found[:16]}…; "
            "the dataset has changed at its source: fetch its manifest again, or tell its publisher"
        )
    return {"url": redact(url), "bytes": size, "sha256": found, "tag": expected.tag}


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    partial = _partial_path(folder)
    try:
        partial.write_text(json.dumps(record) + "\n", encoding="utf-8")
        replace_path(partial, folder / RECORD)
    finally:
        partial.unlink(missing_ok=True)


def _check_space(folder: Path, url: str, expected: _Expected) -> None:
    free = shutil.disk_usage(folder).free
    if expected.bytes is not None and expected.bytes > free:
        raise DataError(
            f"{redact(url)} has {expected.bytes} bytes but {folder.parent} has {free} free: the disk is full; "
            "free space or choose another cache"
        )


@contextmanager
def _storing(folder: Path, url: str) -> Iterator[None]:
    """Convert errors of the file system into a DataError that names the cache."""
    try:
        yield
    except OSError as error:
        full = "the disk is full, " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise DataError(
            f"{redact(url)} cannot be stored in {folder.parent}: {full}{error.strerror or error}; "
            "free space or choose another cache"
        ) from error


def _partial_path(folder: Path) -> Path:
    return folder / f".{_host()}-{os.getpid()}-{uuid4().hex[:8]}{PARTIAL}"


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())[:64]
