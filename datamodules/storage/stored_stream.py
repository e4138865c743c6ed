"""Stored files, in pieces or whole, as raw streams that survive a lost connection."""

import io
import logging
import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import IO, Any

from alignvlm_pl.errors import AlignVLMError, ConfigError, DataError

from .fetching import Policy
from .stored_files import StoredFile

logger = logging.getLogger(__name__)


class StoredStream(io.RawIOBase):
    """Bytes of a stored file, or of several that are read as one; continues after a lost connection at the same byte.

    Errors of the store are raised as DataError, so they differ from the errors of a damaged file; so is a file that is
    shorter than listed.
    """

    def __init__(self, *pieces: StoredFile, policy: Policy | None = None) -> None:
        super().__init__()
        self._pieces = pieces
        self._ends = list(accumulate(piece.size for piece in pieces))
        self._policy = policy or Policy()
        self._opened: tuple[StoredFile, IO[bytes]] | None = None
        self._at = 0

    @property
    def size(self) -> int:
        """Bytes of all pieces."""
        return self._ends[-1]

    @property
    def place(self) -> tuple[StoredFile, int]:
        """The piece that is read, and the byte of it that comes next."""
        number = min(bisect_right(self._ends, self._at), len(self._pieces) - 1)
        piece = self._pieces[number]
        return piece, self._at - self._ends[number] + piece.size

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True; seeking backwards in a remote file is another request."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position; sends no request."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        self._at = max(0, origin + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, at most with one response of the store."""
        piece, at = self.place
        wanted = min(len(buffer), piece.size - at)
        if wanted <= 0:
            return 0
        data = self._read(piece, at, wanted)
        if not data:
            raise DataError(
                f"{piece.path} ends at byte {at}, expected {piece.size} bytes as listed; fetch or publish it again"
            )
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        """Close the file."""
        self._drop()
        super().close()

    def _read(self, piece: StoredFile, at: int, size: int) -> bytes:
        tries = 1 if piece.local else self._policy.retries + 1
        for attempt in range(1, tries + 1):
            try:
                if self._opened is None or self._opened[0] is not piece:
                    self._drop()
                    self._opened = piece, piece.open(forward=True)
                stream = self._opened[1]
                stream.seek(at)
                return stream.read(size)
            except MemoryError:
                raise
            except Exception as error:  # each store has its own errors
                self._drop()
                if attempt == tries:
                    where = f"{piece.path} does not read at byte {at} ({type(error).__name__}: {error})"
                    reason = error if isinstance(error, AlignVLMError) else where
                    raise DataError(f"{reason}; run the same command again") from error
                self._policy.wait(f"{piece.path}, byte {at}", error, attempt)
        raise AssertionError("the last attempt returns or raises")

    def _drop(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            try:
                opened[1].close()
            except Exception:  # the connection is lost anyway
                logger.debug("%s did not close", opened[0].path)


_PIECE_NUMBER = re.compile(r"\.(\d+)$")


def ordered_pieces(pieces: Sequence[StoredFile]) -> list[StoredFile]:
    """Return the pieces of an archive in the order of the numbers in their names; ConfigError: one is missing."""
    numbers = {piece: int(match[1]) for piece in pieces if (match := _PIECE_NUMBER.search(piece.name))}
    if len(numbers) != len(pieces):
        return list(pieces)
    if sorted(numbers.values()) != list(range(len(pieces))):
        raise ConfigError(
            f"the pieces of the archive must be numbered from 0 without a gap, found {sorted(numbers.values())}: "
            "name all of them"
        )
    return sorted(pieces, key=lambda piece: numbers[piece])
