"""Bytes from a URL or a command into a file: one attempt, without any caching (no torch here)."""

import asyncio
import errno
import os
import select
import signal
import subprocess
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from alignvlm_pl.errors import ConfigError, DataError

PIPE = "pipe:"
# Scheme -> module that fsspec needs for it, and the package that brings it.
PACKAGES = {
    "http": ("aiohttp", "aiohttp"),
    "https": ("aiohttp", "aiohttp"),
    "s3": ("s3fs", "s3fs"),
    "gs": ("gcsfs", "gcsfs"),
    "hf": ("huggingface_hub", "huggingface_hub"),
}
_PASSING = (408, 425, 429)
_STORING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_CHUNK = 1 << 20
# On average, once `timeout_s` is over; far below any line on which a set can be read.
MIN_BYTES_PER_S = 1024


class MissingFileError(DataError):
    """There is no file at an address."""


class TransferError(Exception):
    """An attempt has failed in a way that another one may not; never leaves this package."""


class _TooLargeError(Exception):
    pass


class _Meter:
    """Counts what comes; a source that sends too much or drips is left."""

    def __init__(self, *, limit: int, timeout_s: float) -> None:
        self.size = 0
        self._limit, self._timeout_s, self._start = limit, timeout_s, time.monotonic()

    def add(self, size: int) -> None:
        self.size += size
        if self.size > self._limit:
            raise _TooLargeError
        passed = time.monotonic() - self._start
        if passed > self._timeout_s and self.size < MIN_BYTES_PER_S * passed:
            raise TransferError(
                f"{self.size} bytes came in {passed:.0f} s, expected {MIN_BYTES_PER_S} a second"
            )


def transfer(url: str, path: Path, *, limit: int, timeout_s: float) -> None:
    """Write what a URL or a ``pipe:`` command gives to a file.

    Args:
        url: Address with one of the known schemes, or ``pipe:`` and a command, which is run by the shell.
        path: A new file.
        limit: Bytes after which the source is refused.
        timeout_s: Seconds without a byte after which the attempt has failed; from then on `MIN_BYTES_PER_S` are
            asked for on average.

    Raises:
        TransferError: Another attempt may help.
        MissingFileError: There is no such file.
        DataError: The source refuses, or has more than `limit` bytes.
        ConfigError: The package for the scheme is not installed.
        OSError: The file cannot be written.
    """
    # Here, so that whatever cannot be written is told from what cannot be read.
    path.touch(exist_ok=True)
    try:
        if url.startswith(PIPE):
            _run(url.removeprefix(PIPE), path, limit=limit, timeout_s=timeout_s)
        else:
            _download(url, path, limit=limit, timeout_s=timeout_s)
    except _TooLargeError as error:
        raise DataError(
            f"{shown(url)} has more than the expected {limit} bytes; it is not the file that the manifest means, or "
            "none"
        ) from error


def shown(url: str) -> str:
    """Return a URL as errors and logs name it: without password and query, which may be secrets."""
    if url.startswith(PIPE) or "://" not in url:
        return url
    parts = urlsplit(url)
    return urlunsplit(
        (parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "…" if parts.query else "", "")
    )


def require_package(scheme: str) -> None:
    """Raise ConfigError with the pip command where the package for a scheme is not installed."""
    module, package = PACKAGES[scheme]
    try:
        import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{scheme}:// needs the package {package} ({error}); install it: pip install {package}"
        ) from error


def _download(url: str, path: Path, *, limit: int, timeout_s: float) -> None:
    scheme = url.partition(":")[0]
    require_package(scheme)
    import fsspec
    from fsspec.callbacks import Callback

    meter = _Meter(limit=limit, timeout_s=timeout_s)

    class Metered(Callback):
        def relative_update(self, inc: int = 1) -> None:
            meter.add(inc)

    options: dict[str, Any] = {}
    if scheme in ("http", "https"):
        from aiohttp import ClientTimeout

        # aiohttp's default of five minutes in all would refuse large shards; proxies as the environment says.
        timeout = ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
        options = {"client_kwargs": {"timeout": timeout, "trust_env": True}}
    source = url if scheme in ("http", "https") else url.partition("://")[2]
    try:
        # A new one each time: no connection outlives the call, so workers may be forked at any time.
        files = fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False, **options)
        files.get_file(source, str(path), callback=Metered())
    except (_TooLargeError, TransferError):
        raise
    except Exception as error:  # five libraries, each with exceptions of its own
        raise _judged(error, url) from error


def _judged(error: Exception, url: str) -> Exception:
    """Say what an exception of a library means for another attempt."""
    reason = f"{type(error).__name__}: {error}".replace(url, shown(url)).rstrip(": ")
    if isinstance(error, OSError) and (error.errno in _STORING or error.filename is not None):
        return error
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return MissingFileError(f"{shown(url)}: there is no such file ({reason}); check the address")
    refused = isinstance(error, PermissionError) or (status is not None and 400 <= status < 500)
    if refused and status not in _PASSING:
        return DataError(
            f"{shown(url)}: the server refuses it ({reason}); check the address and your access to it"
        )
    if status is not None or isinstance(error, OSError | EOFError | TimeoutError | asyncio.TimeoutError):
        return TransferError(reason)
    if type(error).__module__.partition(".")[0] in (
        "aiohttp",
        "botocore",
        "aiobotocore",
        "gcsfs",
        "httpx",
        "fsspec",
    ):
        return TransferError(reason)
    return DataError(f"{shown(url)} cannot be fetched ({reason}); check the address and its settings")


def _status(error: Exception) -> int | None:
    """Return the HTTP status that an exception of aiohttp, gcsfs or huggingface_hub carries."""
    holders = ((error, "status"), (error, "code"), (getattr(error, "response", None), "status_code"))
    for holder, name in holders:
        # One after the other: aiohttp warns when it is asked for the second.
        value = getattr(holder, name, None)
        if value is not None and str(value).isdigit():
            return int(value)
    return None


def _run(command: str, path: Path, *, limit: int, timeout_s: float) -> None:
    """Store the output of a command of the user's."""
    with tempfile.TemporaryFile() as messages, path.open("wb") as out:
        process = subprocess.Popen(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=messages,
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            meter = _Meter(limit=limit, timeout_s=timeout_s)
            while True:
                if not select.select([process.stdout], [], [], timeout_s)[0]:
                    raise TransferError(f"the command gave nothing for {timeout_s:g} s")
                block = os.read(process.stdout.fileno(), _CHUNK)
                if not block:
                    break
                meter.add(len(block))
                out.write(block)
            process.wait()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.stdout.close()
            process.wait()
        if process.returncode:
            messages.seek(0)
            last = messages.read()[-300:].decode("utf-8", "replace").strip()
            raise TransferError(f"the command ended with status {process.returncode}: {last or 'no message'}")
