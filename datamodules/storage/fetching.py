"""Fetch one file of a dataset from its URL into the cache, complete or not at all (no torch here).

Every version of a file has its own folder in the cache, named by a checksum of what is expected: the full URL, sha256
and tag, so that equal file names never collide. A file is written under another name, checked, and renamed: what is
there under its own name was complete.
"""

import asyncio
import errno
import hashlib
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
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit
from uuid import uuid4

from alignvlm_pl.errors import ConfigError, DataError
from alignvlm_pl.utils.atomic_files import PARTIAL, replace_path

logger = logging.getLogger(__name__)

SCHEMES = ("http", "https", "s3", "gs", "hf")
# Scheme -> package that fsspec needs for it; those of the other schemes are always installed.
_OPTIONAL_PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}
_CLIENTS = ("aiohttp", "botocore", "aiobotocore", "gcsfs", "httpx", "fsspec")
_RETRIED_STATUS = (408, 425, 429)
_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
# Least average rate after `timeout_s`; far below any usable connection.
MIN_BYTES_PER_S = 1024
LOCK = ".lock"
# Far above any shard; keeps a server from filling the disk if the size is not known.
MAX_BYTES = 256 << 30
MAX_BACKOFF_S = 60.0
STALE_PARTIAL_S = 86400.0


class MissingFileError(DataError):
    """There is no file at an address."""


class TransferError(Exception):
    """An attempt has failed and a retry may succeed; never leaves this package."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """Attempts at one file after the first, and seconds without a byte after which one fails.

    `backoff_s` are the approximate seconds before the first retry, doubled for each further one, up to a minute.
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
class Expected:
    """What is known about a file before it is fetched: its size and checksum; None and empty if unknown.

    A copy with another `tag`, its version, is another file. Of unknown size, at most `limit` bytes are accepted.
    """

    bytes: int | None = None
    sha256: str = ""
    tag: str = ""
    limit: int = MAX_BYTES


def fetch(
    url: str,
    *,
    cache: Path,
    expected: Expected | None = None,
    name: str | None = None,
    policy: Policy | None = None,
) -> Path:
    """Return the local copy of a file, downloading it where the cache does not hold the expected one.

    Several processes of one machine that ask for the same file wait for the first. A copy of another size than expected
    is fetched again; the checksum of a copy is computed once, when it arrives.

    Args:
        url: An address that `Storage.locate` has passed; MissingFileError: it has no such file.
        cache: Folder of the copies; created if missing.
        expected: What is known about the file; DataError: it cannot be fetched or stored, or is another one.
        name: Its base name in the cache; None: the last part of the URL.
        policy: Retries and waiting times.
    """
    from filelock import FileLock

    expected = expected or Expected()
    target = cache_path(url, cache=cache, name=name, expected=expected)
    if _is_cached(target, expected):
        return target
    with _storing(target.parent, url):
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / LOCK):  # a dead process holds no lock
            if not _is_cached(target, expected):
                _remove_partial(target.parent)
                _check_space(target.parent, url, expected)
                _download(url, target, expected, policy or Policy())
    return target


def fetch_small(url: str, *, max_bytes: int, policy: Policy | None = None) -> bytes:
    """Return the content of a small file, fresh from its source each time; nothing stays on the disk.

    MissingFileError: there is none; DataError: it cannot be fetched, or is larger than `max_bytes`.
    """
    with TemporaryDirectory() as folder, _storing(Path(folder), url):
        content = Path(folder) / "content"
        _download(url, content, Expected(limit=max_bytes), policy or Policy())
        return content.read_bytes()


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """Return a checksum of a file by one of `hashlib`'s algorithms, in hexadecimal digits."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def cache_path(url: str, *, cache: Path, name: str | None = None, expected: Expected) -> Path:
    """Return where the copy of a file lies, whether it is there or not."""
    # CONTRACT: the key has the full URL with its query, so a signed URL that changes is another file.
    described = f"{url}\n{expected.sha256}\n{expected.tag}"
    key = hashlib.sha256(described.encode("utf-8", "surrogateescape")).hexdigest()
    base = name or unquote(urlsplit(url).path)
    safe = re.sub(r"[^A-Za-z0-9._+=@-]", "_", base.rstrip("/").rpartition("/")[2])[-200:].lstrip(".")
    return Path(cache) / key / (safe or "file")


def _is_cached(target: Path, expected: Expected) -> bool:
    return target.is_file() and expected.bytes in (None, target.stat().st_size)


def _remove_partial(folder: Path) -> None:
    """Remove partial files of killed processes; the caller holds the lock."""
    for left in folder.glob(f".*{PARTIAL}"):
        with suppress(OSError):
            # No other process of this machine writes here now; another machine may, whose locks are not seen here.
            ours = left.name.startswith(f".{_host()}-")
            if ours or time.time() - left.stat().st_mtime > STALE_PARTIAL_S:
                left.unlink()


def _download(url: str, target: Path, expected: Expected, policy: Policy) -> None:
    """Write a file, in as many attempts as the policy allows."""
    reason = ""
    for attempt in range(policy.retries + 1):
        if attempt:
            policy.wait(redact(url), reason, attempt)
        partial = _partial_path(target.parent)
        try:
            limit = expected.limit if expected.bytes is None else expected.bytes
            _transfer(url, partial, limit=limit, timeout_s=policy.timeout_s)
            _check(partial, url, expected)
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


def _check(partial: Path, url: str, expected: Expected) -> None:
    """Check a download; a short one may be tried again, another file not."""
    size = partial.stat().st_size
    if expected.bytes is not None and size < expected.bytes:
        raise TransferError(f"expected {expected.bytes} bytes, received {size}")
    if expected.sha256 and (found := file_digest(partial)) != expected.sha256:
        raise DataError(
            f"{redact(url)} is damaged or another file: expected sha256 {expected.sha256[:16]}…, found {found[:16]}…; "
            "the dataset has changed at its source: fetch its manifest again, or tell its publisher"
        )


def _check_space(folder: Path, url: str, expected: Expected) -> None:
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


def _transfer(url: str, path: Path, *, limit: int, timeout_s: float) -> None:
    """Write the content of a URL with one of `SCHEMES` to a new file.

    Args:
        url: Address.
        path: The file; OSError: it cannot be written.
        limit: Bytes after which the source is refused.
        timeout_s: Seconds without a byte after which the attempt fails; a longer transfer must average
            `MIN_BYTES_PER_S`.

    Raises:
        TransferError: Another attempt may help.
        MissingFileError: There is no such file.
        DataError: The source refuses, or has more than `limit` bytes.
        ConfigError: The package for the scheme is not installed.
    """
    scheme, _, address = url.partition("://")
    web = scheme in ("http", "https")
    require_package(scheme)
    import fsspec
    from fsspec.callbacks import Callback

    start = time.monotonic()

    class Meter(Callback):
        """Counts received bytes and refuses a source that sends too many or is too slow."""

        received = 0

        def relative_update(self, inc: int = 1) -> None:
            self.received += inc
            if self.received > limit:
                raise DataError(
                    f"{redact(url)} has more than the expected {limit} bytes; it is not the file of the manifest"
                )
            passed = time.monotonic() - start
            if passed > timeout_s and self.received < MIN_BYTES_PER_S * passed:
                raise TransferError(
                    f"received {self.received} bytes in {passed:.0f} s, expected at least {MIN_BYTES_PER_S} a second"
                )

    options: dict[str, Any] = {}
    if web:
        from aiohttp import ClientTimeout

        # aiohttp's default of five minutes in all would refuse large shards; proxies as the environment says.
        timeout = ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
        options = {"client_kwargs": {"timeout": timeout, "trust_env": True}}
    # Before the download, so that a write error is distinguished from a read error.
    path.touch(exist_ok=True)
    try:
        # A new instance each time: no connection outlives the call, so workers may be forked at any time.
        files = fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False, **options)
        files.get_file(url if web else address, str(path), callback=Meter())
    except (DataError, TransferError):
        raise
    except Exception as error:  # five libraries with different exceptions
        raise _classify_error(error, url) from error


def redact(url: str) -> str:
    """Return a URL for errors and logs: without password and query, which may be secrets."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "…" if parts.query else "", ""))


def require_package(scheme: str) -> None:
    """Raise ConfigError with the pip command where the package for a scheme is not installed."""
    if package := _OPTIONAL_PACKAGES.get(scheme):
        try:
            import_module(package)
        except ImportError as error:
            message = f"{scheme}:// needs the package {package} ({error}); install it: pip install {package}"
            raise ConfigError(message) from error


def _classify_error(error: Exception, url: str) -> Exception:
    """Return the error to raise for an exception of a library: retry (`TransferError`), missing, refused or other."""
    reason = f"{type(error).__name__}: {error}".replace(url, redact(url)).rstrip(": ")
    if isinstance(error, OSError) and (error.errno in _WRITE_ERRORS or error.filename is not None):
        return error
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return MissingFileError(f"{redact(url)}: there is no such file ({reason}); check the address")
    refused = isinstance(error, PermissionError) or (status is not None and 400 <= status < 500)
    if refused and status not in _RETRIED_STATUS:
        return DataError(f"{redact(url)}: the server refuses it ({reason}); check the address and your access to it")
    of_client = type(error).__module__.partition(".")[0] in _CLIENTS
    if status is not None or of_client or isinstance(error, OSError | EOFError | asyncio.TimeoutError):
        return TransferError(reason)
    return DataError(f"{redact(url)} cannot be fetched ({reason}); check the address and its settings")


def _status(error: Exception) -> int | None:
    """Return the HTTP status that an exception of aiohttp, gcsfs or huggingface_hub carries."""
    # In this order: aiohttp warns when `code` is read.
    for holder, name in ((error, "status"), (error, "code"), (getattr(error, "response", None), "status_code")):
        if str(value := getattr(holder, name, None)).isdigit():
            return int(str(value))
    return None
