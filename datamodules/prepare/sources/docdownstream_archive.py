"""DocDownstream's lines with their pages in the published archive, which is read once from its first byte to its last.

A line is given out when its last page has passed. Pages are kept only as long as a line about several pages waits for
another one; all else that is held is where each line begins in its file.
"""

import os
import posixpath
import tempfile
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from alignvlm_pl.errors import ConfigError

from ...shards.sample import SampleError
from ...storage.split_archive import ordered_pieces, stream_files
from ...storage.stored_files import StoredFile
from ..pack.source import Part
from .docdownstream_rows import DocumentLines
from .pictures import Picture
from .source import SourceSample, checked_image

_DECODERS = min(os.cpu_count() or 1, 8)
_IN_MEMORY_BYTES = 256 << 20
"""Waiting pages beyond this lie in a temporary file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DocDownstreamArchive:
    """Lines whose pages lie in a tar in pieces.

    Attributes:
        lines: The lines.
        pieces: Files of the archive.
        name: Name of the set.
        source: Value of ``source`` for lines without ``dataset_name``.
        license: Terms of the set.
    """

    lines: DocumentLines
    pieces: tuple[StoredFile, ...]
    name: str = "docdownstream"
    source: str = "docdownstream"
    license: str = "Apache-2.0"

    def parts(self) -> list[Part]:
        """Return one part: a stream cannot be entered in the middle.

        Raises:
            ConfigError: A piece or a set that is asked for is missing.
            DataError: No such file, or its lines are of another schema.
        """
        if not self.pieces:
            raise ConfigError("name the pieces of the archive with --archive")
        ordered_pieces(self.pieces)
        self.lines.check()
        return [Part(name=self.lines.path.name, payload=(), rows=sum(1 for _ in self.lines.raw()))]

    def input_bytes(self) -> int:
        """Estimate the size of all pages, each as often as lines ask about it, from that of the archive."""
        pages = self.lines.pages()
        size = sum(piece.size for piece in self.pieces)
        return size * pages.total() // max(len(pages), 1)

    def read(self, part: Part) -> Iterator[SourceSample | SampleError]:
        """Yield bad lines, then the samples in the order in which the archive completes them, then what is missing.

        Raises:
            DataError: The archive is damaged.
        """
        del part  # there is only one
        waiting = _Waiting()
        for number, at, text in self.lines.raw():
            try:
                line = self.lines.parse(text, number)
            except SampleError as error:
                yield error
                continue
            if line is not None and line.pages:
                waiting.add(number, at, map(_page, line.pages))
            elif line is not None:
                yield SourceSample(record=line.record, images=[])
        with _Held() as held:
            yield from self._from_archive(waiting, held)
        for number, missing in waiting.unanswered():
            where = self.lines.where(number)
            yield SampleError(f"{where}: image {missing} is not in the archive", "missing_image")

    def _from_archive(self, waiting: "_Waiting", held: "_Held") -> Iterator[SourceSample | SampleError]:
        files = stream_files(ordered_pieces(self.pieces), lambda name: waiting.wants(_page(name)))
        for name, picture in _decoded_ahead(files):
            page = _page(name)
            numbers = waiting.about(page)
            if isinstance(picture, SampleError):
                for number in numbers:
                    waiting.give_up(number, held)
                    yield SampleError(f"{self.lines.where(number)}: {picture}", picture.reason)
                continue
            complete = [number for number in numbers if waiting.lacks_one(number)]
            if len(complete) < len(numbers):
                held.add(page, picture, users=len(numbers) - len(complete))
            for number in numbers:
                if number in complete:
                    yield self._sample(number, {page: picture}, waiting, held)
                else:
                    waiting.came(number, page)

    def _sample(
        self, number: int, pictures: dict[str, Picture], waiting: "_Waiting", held: "_Held"
    ) -> SourceSample:
        """Make the sample of a line from the page that came last and those that are held."""
        with self.lines.path.open("rb") as stream:
            stream.seek(waiting.offset(number))
            line = self.lines.parse(stream.readline(), number)
        assert line is not None  # it was of use when it was added
        pages = [_page(page) for page in line.pages]
        found = pictures | {page: held.get(page) for page in pages if page not in pictures}
        waiting.give_up(number, held)
        return SourceSample(record=line.record, images=[found[page] for page in pages])


def _decoded_ahead(
    files: Iterable[tuple[str, bytes]],
) -> Iterator[tuple[str, tuple[bytes, str] | SampleError]]:
    """Decode pages to their end in threads, a few ahead, and yield them in their order.

    The archive is one part, so other processes cannot help; Pillow's decoders let other threads run.
    """
    ahead: deque[tuple[str, Future[tuple[bytes, str] | SampleError]]] = deque()
    with warnings.catch_warnings(), ThreadPoolExecutor(_DECODERS, thread_name_prefix="pages") as pool:
        # `load_image` silences Pillow for a while, which threads undo for one another.
        warnings.simplefilter("ignore")
        for name, data in files:
            ahead.append((name, pool.submit(_checked, data, name)))
            if len(ahead) > 2 * _DECODERS:
                done, future = ahead.popleft()
                yield done, future.result()
        yield from ((name, future.result()) for name, future in ahead)


def _checked(data: bytes, name: str) -> tuple[bytes, str] | SampleError:
    try:
        return checked_image(data, f"image {name}")
    except SampleError as error:
        return error


class _Waiting:
    """Lines that wait for pages."""

    def __init__(self) -> None:
        self._by_page: dict[str, list[int]] = {}
        self._lines: dict[int, _Line] = {}

    def add(self, number: int, offset: int, pages: Iterable[str]) -> None:
        """Let a line that begins at a byte of its file wait for pages."""
        names = tuple(dict.fromkeys(pages))
        self._lines[number] = _Line(offset=offset, left=len(names))
        for page in names:
            self._by_page.setdefault(page, []).append(number)

    def wants(self, page: str) -> bool:
        """Whether a line still waits for a page."""
        return any(number in self._lines for number in self._by_page.get(page, ()))

    def about(self, page: str) -> list[int]:
        """Return the lines that still wait for a page, and expect it no more: another of its name is passed over."""
        return [number for number in self._by_page.pop(page, ()) if number in self._lines]

    def lacks_one(self, number: int) -> bool:
        """Whether a line lacks one page only."""
        return self._lines[number].left == 1

    def came(self, number: int, page: str) -> None:
        """Note that a page of a line is held."""
        line = self._lines[number]
        line.left -= 1
        line.held.append(page)

    def offset(self, number: int) -> int:
        """Return the byte at which a line begins."""
        return self._lines[number].offset

    def give_up(self, number: int, held: "_Held") -> None:
        """Forget a line and free its pages."""
        for page in self._lines.pop(number).held:
            held.free(page)

    def unanswered(self) -> Iterator[tuple[int, str]]:
        """Yield the lines that are left, each with a page that never came."""
        first: dict[int, str] = {}
        for page, numbers in self._by_page.items():
            for number in numbers:
                first.setdefault(number, page)
        yield from ((number, first[number]) for number in sorted(self._lines))


@dataclass(kw_only=True, slots=True)
class _Line:
    offset: int
    left: int
    held: list[str] = field(default_factory=list)


class _Held:
    """Pages that lines wait with: in memory, and beyond a limit as files of a temporary folder."""

    def __init__(self, limit: int = _IN_MEMORY_BYTES) -> None:
        self.in_memory = 0
        self._limit = limit
        self._pages: dict[str, tuple[bytes | Path, str]] = {}
        self._users: dict[str, int] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="pages-")  # closed by __exit__
        self._files = 0

    def __enter__(self) -> "_Held":
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def add(self, page: str, picture: tuple[bytes, str], *, users: int) -> None:
        """Keep a page until as many lines have freed it."""
        data, ending = picture
        kept: bytes | Path = data
        if self.in_memory + len(data) > self._limit:
            kept = Path(self._folder.name) / str(self._files)
            kept.write_bytes(data)
            self._files += 1
        else:
            self.in_memory += len(data)
        self._pages[page], self._users[page] = (kept, ending), users

    def get(self, page: str) -> Picture:
        """Return a page that is kept."""
        kept, ending = self._pages[page]
        return (kept if isinstance(kept, bytes) else kept.read_bytes()), ending

    def free(self, page: str) -> None:
        """Note that a line needs a page no more."""
        self._users[page] -= 1
        if self._users[page]:
            return
        kept, _ = self._pages.pop(page)
        del self._users[page]
        if isinstance(kept, bytes):
            self.in_memory -= len(kept)
        else:
            kept.unlink()


def _page(name: str) -> str:
    """Return the path of a page as lines and archive both write it."""
    return posixpath.normpath(name).removeprefix("/")
