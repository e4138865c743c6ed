"""A tar that is stored in pieces, read as one stream: never joined or unpacked on the disk."""

import gzip
import io
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from alignvlm_pl.errors import ConfigError, DataError

from .stored_files import StoredFile
from .stored_stream import StoredStream

_GZIP_MAGIC = b"\x1f\x8b"
_BLOCK = tarfile.BLOCKSIZE
_BUFFER_BYTES = 4 << 20
_PIECE_NUMBER = re.compile(r"\.(\d+)$")


def ordered_pieces(pieces: Sequence[StoredFile]) -> list[StoredFile]:
    """Return the pieces of an archive in their order.

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
        wanted: Whether a file of a name is yielded; the others' content is passed over.

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
    zipped = buffered.peek(2)[:2] == _GZIP_MAGIC
    stream = _Forward(gzip.GzipFile(fileobj=buffered, mode="rb") if zipped else buffered)
    with tarfile.TarFile(fileobj=stream) as tar:  # type: ignore[arg-type]  # it needs read, tell and seek only
        while (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep the header of each of a million files
            if info.isreg() and wanted(info.name):
                stream.seek(info.offset_data)
                data = stream.read(info.size)
                if len(data) < info.size:
                    raise EOFError(f"it ends inside {info.name}")
                yield info.name, data
    # To tarfile a broken header is the end of the archive: look what the last one was.
    if stream.last != bytes(_BLOCK):
        what = "it ends without its end mark" if len(stream.last) < _BLOCK else "a header is broken"
        raise EOFError(f"{what} at byte {stream.tell() - len(stream.last)} of the unpacked tar")
    zeros = 1
    while block := stream.read(_BLOCK):
        zeros += 1
        if block.strip(b"\0"):
            raise EOFError(
                f"a header of zeros in the middle, before byte {stream.tell()} of the unpacked tar"
            )
    if zeros < 2:
        raise EOFError("its end mark is cut")


class _Forward:
    """What tarfile needs of a file, over a stream that goes forward only; remembers what was read last."""

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
    """Files one after the other."""

    def __init__(self, files: Sequence[StoredFile]) -> None:
        super().__init__()
        self._rest = list(files)
        self._stream = StoredStream(self._rest.pop(0))

    @property
    def place(self) -> str:
        """Piece and byte that the stream has come to."""
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
