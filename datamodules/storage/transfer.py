"""Bytes from a URL into a file: one attempt, without any caching (no torch here)."""

import asyncio
import errno
import time
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from alignvlm_pl.errors import ConfigError, DataError

SCHEMES = ("http", "https", "s3", "gs", "hf")
# Scheme -> package that fsspec needs for it; those of the other schemes are always installed.
_OPTIONAL_PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}
_CLIENTS = ("aiohttp", "botocore", "aiobotocore", "gcsfs", "httpx", "fsspec")
_RETRIED_STATUS = (408, 425, 429)
_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
# Least average rate after `timeout_s`; far below any usable connection.
MIN_BYTES_PER_S = 1024


class MissingFileError(DataError):
    """There is no file at an address."""


class TransferError(Exception):
    """An attempt has failed and a retry may succeed; never leaves this package."""


def transfer(url: str, path: Path, *, limit: int, timeout_s: float) -> None:
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
