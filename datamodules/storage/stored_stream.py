"""A stored file as a raw stream that outlives a lost connection: it opens the file again and goes on at the byte."""

import io
import logging
import random
import time
from typing import IO, Any

from alignvlm_pl.errors import AlignVLMError, DataError

from .fetching import MAX_BACKOFF_S, Policy
from .stored_files import StoredFile

logger = logging.getLogger(__name__)


class StoredStream(io.RawIOBase):
    """Bytes of a file. Whatever its store raises leaves as a DataError, never as what a damaged file would raise.

    Raises:
        DataError: On reading, where the file does not answer, or ends before the size that it was listed with.
    """

    def __init__(self, file: StoredFile, policy: Policy | None = None) -> None:
        super().__init__()
        self.file = file
        self._policy = policy or Policy()
        self._stream: IO[bytes] | None = None
        self._at = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True; a step back over the network is a request of its own."""
        return True

    def tell(self) -> int:
        """Return the byte that comes next."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte; nothing is asked of the store."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.file.size}[whence]
        self._at = max(0, origin + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, as far as one answer of the store goes."""
        wanted = min(len(buffer), self.file.size - self._at)
        if wanted <= 0:
            return 0
        data = self._read(wanted)
        if not data:
            raise DataError(
                f"{self.file.path} ends at byte {self._at}, expected {self.file.size} bytes as it was listed; fetch or "
                "publish it again"
            )
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        """Close the file."""
        self._drop()
        super().close()

    def _read(self, size: int) -> bytes:
        tries = 1 if self.file.local else self._policy.retries + 1
        for attempt in range(1, tries + 1):
            try:
                if self._stream is None:
                    self._stream = self.file.open(forward=True)
                self._stream.seek(self._at)
                return self._stream.read(size)
            except MemoryError:
                raise
            except Exception as error:  # each store has its own errors
                self._drop()
                if attempt == tries:
                    raise DataError(self._unread(error)) from error
                wait = min(self._policy.backoff_s * 2 ** (attempt - 1), MAX_BACKOFF_S)
                logger.warning(
                    "%s, byte %d: %s; attempt %d in %.1f s",
                    self.file.path,
                    self._at,
                    error,
                    attempt + 1,
                    wait,
                )
                time.sleep(wait * random.Random().uniform(0.75, 1.25))
        raise AssertionError("the last attempt returns or raises")

    def _unread(self, error: Exception) -> str:
        if isinstance(error, AlignVLMError):
            return f"{error}; run the same command again"
        return (
            f"{self.file.path} does not read at byte {self._at} ({type(error).__name__}: {error}); run the same "
            "command again"
        )

    def _drop(self) -> None:
        if self._stream is not None:
            stream, self._stream = self._stream, None
            try:
                stream.close()
            except Exception:  # it is lost anyway
                logger.debug("%s did not close", self.file.path)
