"""Stored files as raw streams that survive a lost connection, and a tar in pieces read as one such stream."""

import gzip
import io
import logging
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from alignvlm_pl.errors import AlignVLMError, ConfigError, DataError
from alignvlm_pl.utils.text_files import HEAD_BYTES, compression

from .fetching import Policy
from .stored_files import StoredFile

logger = logging.getLogger(__name__)


class StoredStream(io.RawIOBase):
    """Bytes of a stored file; after a lost connection it reopens the file and continues at the same byte.

    Errors of the store are raised as DataError, so they differ from the errors of a damaged file.

    Raises:
        DataError: On reading, if the store does not respond, or the file is shorter than listed.
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
        """Return True; seeking backwards in a remote file is another request."""
        return True

    def tell(self) -> int:
        """Return the byte that comes next."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position; sends no request."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.file.size}[whence]
        self._at = max(0, origin + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, at most with one response of the store."""
        wanted = min(len(buffer), self.file.size - self._at)
        if wanted <= 0:
            return 0
        data = self._read(wanted)
        if not data:
            raise DataError(
                f"{self.file.path} ends at byte {self._at}, expected {self.file.size} bytes as listed; fetch or "
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
                    at = f"{self.file.path} does not read at byte {self._at} ({type(error).__name__}: {error})"
                    reason = error if isinstance(error, AlignVLMError) else at
                    raise DataError(f"{reason}; run the same command again") from error
                self._policy.wait(f"{self.file.path}, byte {self._at}", error, attempt)
        raise AssertionError("the last attempt returns or raises")

    def _drop(self) -> None:
        if self._stream is not None:
            stream, self._stream = self._stream, None
            try:
                stream.close()
            except Exception:  # the connection is lost anyway
                logger.debug("%s did not close", self.file.path)


_BLOCK = tarfile.BLOCKSIZE
_BUFFER_BYTES = 4 << 20
_PIECE_NUMBER = re.compile(r"\.(\d+)$")


def ordered_pieces(pieces: Sequence[StoredFile]) -> list[StoredFile]:
    """Return the pieces of an archive in the order of their numbers.

    Raises:
        ConfigError: Their names end in numbers, and one of these is missing.
    """
    numbers = {piece: int(match[1]) for piece in pieces if (match := _PIECE_NUMBER.search(piece.name))}
    if len(numbers) != len(pieces):
        return list(pieces)
    if sorted(numbers.values()) != list(range(len(pieces))):
        raise ConfigError(
            f"the pieces of the archive must be numbered from 0 without a gap, found {sorted(numbers.values())}: "
            "name all of them"
        )
    return sorted(pieces, key=lambda piece: numbers[piece])


def stream_files(pieces: Sequence[StoredFile], wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the files of a tar, gzipped or not, in its order.

    Args:
        pieces: Files that the tar is cut into.
        wanted: Whether to yield the file of a name; other content is skipped.

    Raises:
        DataError: It is damaged, ends early, or its store does not give it; names the piece and the byte of it.
    """
    with _Joined(pieces) as joined:
        try:
            yield from _files(joined, wanted)
        except (EOFError, OSError, zlib.error, tarfile.TarError) as error:
            raise DataError(
                f"{joined.place}: the archive is damaged or a piece of it is missing ({error}); compare the sizes of "
                "its pieces with what is published and fetch the short one again"
            ) from error


def _files(joined: "_Joined", wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    buffered = io.BufferedReader(joined, _BUFFER_BYTES)
    kind = compression(buffered.peek(HEAD_BYTES))
    if kind not in ("", "gzip"):
        raise DataError(f"{joined.place}: it is {kind}, expected a tar, gzipped or not: unpack it first")
    stream = _Forward(gzip.GzipFile(fileobj=buffered, mode="rb") if kind else buffered)
    with tarfile.TarFile(fileobj=stream) as tar:  # type: ignore[arg-type]  # read, tell and seek suffice
        while (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # or it keeps every header in memory
            if info.isreg() and wanted(info.name):
                stream.seek(info.offset_data)
                data = stream.read(info.size)
                if len(data) < info.size:
                    raise EOFError(f"it ends inside {info.name}")
                yield info.name, data
    # tarfile takes a broken header for the end of the archive: check the last block.
    if stream.last != bytes(_BLOCK):
        what = "it ends without its end mark" if len(stream.last) < _BLOCK else "a header is broken"
        raise EOFError(f"{what} at byte {stream.tell() - len(stream.last)} of the unpacked tar")
    zeros = 1
    while block := stream.read(_BLOCK):
        zeros += 1
        if block.strip(b"\0"):
            raise EOFError(f"a header of zeros in the middle, before byte {stream.tell()} of the unpacked tar")
    if zeros < 2:
        raise EOFError("its end mark is cut")


class _Forward:
    """The file interface that tarfile needs, over a forward-only stream; keeps the last block read."""

    def __init__(self, stream: "gzip.GzipFile | io.BufferedReader[Any]") -> None:
        self.last = b""
        self._stream = stream
        self._at = 0

    def tell(self) -> int:
        return self._at

    def read(self, size: int) -> bytes:
        pieces = []
        while size > 0 and (piece := self._stream.read(size)):
            pieces.append(piece)
            size -= len(piece)
        self.last = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._at += len(self.last)
        return self.last

    def seek(self, offset: int) -> int:
        if offset < self._at:
            raise tarfile.ReadError(f"the stream is at byte {self._at} and cannot go back to {offset}")
        while self._at < offset and self.read(min(offset - self._at, _BUFFER_BYTES)):
            pass
        return self._at


class _Joined(io.RawIOBase):
    """Several files as one raw stream."""

    def __init__(self, files: Sequence[StoredFile]) -> None:
        super().__init__()
        self._rest = list(files)
        self._stream = StoredStream(self._rest.pop(0))

    @property
    def place(self) -> str:
        """Current piece and byte, for errors."""
        return f"{self._stream.file.path}, near byte {self._stream.tell()}"

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not (count := self._stream.readinto(buffer)) and self._rest:
            self._stream.close()
            self._stream = StoredStream(self._rest.pop(0))
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()
