"""`prepare docdownstream`: lines of DocDownstream-1.0, with pages in a folder or in the published archive -> shards.

The archive is streamed once, from its first byte to its last: it is neither joined nor unpacked on disk. For a dataset
of the hub only the file of lines is stored while the command runs.
"""

import argparse
import posixpath
import tempfile
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignvlm_pl.errors import ConfigError, DataError, nearest
from alignvlm_pl.preprocessing.images.source import describe_source

from ..shards.columns import LINES
from ..shards.sample import SampleError, check_record
from ..storage.file_kinds import existing_file, path_text
from ..storage.stored_files import StoredFile, find_file, list_folder
from ..storage.stored_stream import ordered_pieces, stream_files
from .input_files import choose_list, fetched_list
from .pack.engine import pack, print_yield
from .pack.options import DEFAULT_WORKERS, PackOptions, add_options
from .sources.dialogues import check_answered, read_conversation
from .sources.images import EncodedImage, ImageFolder, image_names
from .sources.json_files import parse_object, parsed_lines, raw_lines, require_lines
from .sources.source import Part, RawData, SourceSample, checked_image, or_error

_PART_LINES = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentLine:
    """A valid line, without its images.

    Attributes:
        record: JSON in the sample schema.
        pages: Paths of its images, in the order of their index.
    """

    record: dict[str, Any]
    pages: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentLines:
    """The lines of a file.

    Attributes:
        path: The file.
        origin: What errors call it; empty: by its path.
        sources: Values of ``dataset_name`` to keep; empty: all.
    """

    path: Path
    origin: str = ""
    sources: tuple[str, ...] = ()

    def raw(self, start: int = 0, end: int | None = None, first: int = 1) -> Iterator[tuple[int, int, bytes]]:
        """Yield number, first byte and text of the lines that are not blank, from one byte to another."""
        if not self.path.is_file():
            raise DataError(f"no such jsonl file: {self.path}")
        return raw_lines(self.path, start, end, first)

    def parse(self, text: bytes, number: int) -> DocumentLine | None:
        """Convert a line; None if its ``dataset_name`` is not in `sources`.

        Raises:
            SampleError: It is invalid.
        """
        where = self.where(number)
        given = parse_object(text, where=where)
        if self.sources and given.get("dataset_name") not in self.sources:
            return None
        pages = image_names(given, where=where)
        record = read_conversation(given, num_images=len(pages), where=where)
        check_record(record, num_images=len(pages), where=where)
        check_answered(record, where=where)
        record.setdefault("id", f"{path_text(self.path.stem)}/{number}")
        return DocumentLine(record=record, pages=pages)

    def check(self) -> None:
        """Check that the lines are conversations, and that all `sources` occur.

        Raises:
            ConfigError: One does not occur; lists those that do.
            DataError: The lines are of another schema.
        """
        texts = (text for _, _, text in self.raw())
        require_lines(self.path)
        LINES.check_records(parsed_lines(texts), "messages", where=self.origin or str(self.path))
        if not self.sources:
            return
        records = parsed_lines(text for _, _, text in self.raw())
        names = {str(record.get("dataset_name")) for record in records if isinstance(record, Mapping)}
        for name in self.sources:
            if name not in names:
                raise ConfigError(
                    f"--sources: {self.origin or self.path} has no lines of {name!r}; {nearest(name, names)}"
                )

    def pages(self) -> Counter[str]:
        """Return the number of lines per page."""
        found: Counter[str] = Counter()
        for number, _, text in self.raw():
            try:
                line = self.parse(text, number)
            except SampleError:
                continue
            found.update(line.pages if line else [])
        return found

    def where(self, number: int) -> str:
        """Name a line in errors."""
        return f"{self.origin or self.path}, line {number}"


@dataclass(frozen=True, kw_only=True, slots=True)
class DocDownstream:
    """Lines with the terms of their dataset.

    Attributes:
        lines: The lines.
        name: Name of the dataset.
        source: Value of ``source`` for lines without ``dataset_name``.
        license: Terms of the dataset.
    """

    lines: DocumentLines
    name: str = "docdownstream"
    source: str = "docdownstream"
    license: str = "Apache-2.0"


@dataclass(frozen=True, kw_only=True, slots=True)
class DocDownstreamFolder(DocDownstream):
    """Lines whose pages lie in a folder.

    Attributes:
        images: Folder that the lines' paths are relative to.
    """

    images: ImageFolder

    def parts(self) -> list[Part]:
        """Return a part for each few thousand lines.

        Raises:
            ConfigError: A dataset of `sources` does not occur.
            DataError: No such file, or its lines are of another schema.
        """
        self.lines.check()
        found = [(number, at, at + len(text)) for number, at, text in self.lines.raw()]
        pieces = [found[at : at + _PART_LINES] for at in range(0, len(found), _PART_LINES)]
        name = self.lines.path.name
        return [
            Part(name=f"{name}#{piece[0][0]}", payload=(*piece[0][:2], piece[-1][2]), rows=len(piece))
            for piece in pieces
        ]

    def input_bytes(self) -> int:
        """Return the size of all pages, each as often as lines ask about it: shards hold it that often."""
        paths = ((existing_file(self.images.root, page), count) for page, count in self.lines.pages().items())
        return sum(path.stat().st_size * count for path, count in paths if path)

    def spool_bytes(self) -> int:
        """Return the size of the lines: pages are read again from their files."""
        return self.lines.path.stat().st_size

    def read(self, part: Part) -> Iterator[SourceSample | SampleError]:
        """Yield the lines of a part; datasets that are not in `sources` are skipped."""
        first, start, end = part.payload
        for number, _, text in self.lines.raw(start, end, first):
            where = self.lines.where(number)
            try:
                line = self.lines.parse(text, number)
                if line is not None:
                    images = [self.images.read(page, where=where) for page in line.pages]
                    yield SourceSample(record=line.record, images=images)
            except SampleError as error:
                yield error


_IN_MEMORY_BYTES = 256 << 20
"""Waiting pages beyond this lie in a temporary file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DocDownstreamArchive(DocDownstream):
    """Lines whose pages lie in a tar in pieces.

    Attributes:
        pieces: Files of the archive.
    """

    pieces: tuple[StoredFile, ...]

    def parts(self) -> list[Part]:
        """Return one part: a stream cannot be entered in the middle.

        Raises:
            ConfigError: A piece of the archive is missing, or a dataset of `sources` does not occur.
            DataError: No such file, or its lines are of another schema.
        """
        if not self.pieces:
            raise ConfigError("name the pieces of the archive with --archive")
        ordered_pieces(self.pieces)
        self.lines.check()
        return [Part(name=self.lines.path.name, payload=(), rows=sum(1 for _ in self.lines.raw()))]

    def input_bytes(self) -> int:
        """Estimate the bytes of all pages, counted once per line, from the size of the archive."""
        pages = self.lines.pages()
        size = sum(piece.size for piece in self.pieces)
        return size * pages.total() // max(len(pages), 1)

    def read(self, part: Part) -> Iterator[SourceSample | SampleError]:
        """Yield invalid lines, then samples in the order in which they complete, then lines with missing pages.

        Raises:
            DataError: The archive is damaged.
        """
        del part  # there is only one
        pending = _PendingLines()
        for number, at, text in self.lines.raw():
            try:
                line = self.lines.parse(text, number)
            except SampleError as error:
                yield error
                continue
            if line is not None and line.pages:
                pending.add(number, at, map(_page, line.pages))
            elif line is not None:
                yield SourceSample(record=line.record, images=[])
        with _PageCache() as cache:
            yield from self._from_archive(pending, cache)
        for number, missing in pending.incomplete():
            where = self.lines.where(number)
            yield SampleError(f"{where}: image {describe_source(missing)} is not in the archive", "missing_image")

    def _from_archive(self, pending: "_PendingLines", cache: "_PageCache") -> Iterator[SourceSample | SampleError]:
        files = stream_files(ordered_pieces(self.pieces), lambda name: pending.needs(_page(name)))
        for name, image in _decode_ahead(files):
            page = _page(name)
            numbers = pending.pop_lines(page)
            if isinstance(image, SampleError):
                for number in numbers:
                    pending.drop(number, cache)
                    yield SampleError(f"{self.lines.where(number)}: {image}", image.reason)
                continue
            complete = [number for number in numbers if pending[number].missing == 1]
            if len(complete) < len(numbers):
                cache.add(page, image, users=len(numbers) - len(complete))
            for number in numbers:
                if number in complete:
                    yield self._sample(number, {page: image}, pending, cache)
                else:
                    pending[number].missing -= 1
                    pending[number].cached.append(page)

    def _sample(
        self, number: int, images: dict[str, EncodedImage], pending: "_PendingLines", cache: "_PageCache"
    ) -> SourceSample:
        """Make the sample of a line from its last page and the cached ones."""
        with self.lines.path.open("rb") as stream:
            stream.seek(pending[number].offset)
            line = self.lines.parse(stream.readline(), number)
        assert line is not None  # it was valid when it was added
        pages = [_page(page) for page in line.pages]
        found = images | {page: cache.get(page) for page in pages if page not in images}
        pending.drop(number, cache)
        return SourceSample(record=line.record, images=[found[page] for page in pages])


def _decode_ahead(files: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, tuple[bytes, str] | SampleError]]:
    """Decode pages to their end in threads, a few ahead, and yield them in their order.

    The archive is one part, so other processes cannot help; Pillow's decoders let other threads run.
    """
    ahead: deque[tuple[str, Future[tuple[bytes, str] | SampleError]]] = deque()
    with warnings.catch_warnings(), ThreadPoolExecutor(DEFAULT_WORKERS, thread_name_prefix="pages") as pool:
        # `load_image` silences Pillow for a while, which threads undo for one another.
        warnings.simplefilter("ignore")
        for name, data in files:
            ahead.append((name, pool.submit(or_error, checked_image, data, f"image {describe_source(name)}")))
            if len(ahead) > 2 * DEFAULT_WORKERS:
                done, future = ahead.popleft()
                yield done, future.result()
        yield from ((name, future.result()) for name, future in ahead)


@dataclass(kw_only=True, slots=True)
class _Line:
    """A line that waits for pages: its byte in the file, the number of missing pages, and the pages in the cache."""

    offset: int
    missing: int
    cached: list[str] = field(default_factory=list)


class _PendingLines(dict[int, _Line]):
    """Lines that wait for pages, by number."""

    def __init__(self) -> None:
        super().__init__()
        self._by_page: dict[str, list[int]] = {}

    def add(self, number: int, offset: int, pages: Iterable[str]) -> None:
        """Add a line that begins at byte `offset` of its file and waits for pages."""
        names = tuple(dict.fromkeys(pages))
        self[number] = _Line(offset=offset, missing=len(names))
        for page in names:
            self._by_page.setdefault(page, []).append(number)

    def needs(self, page: str) -> bool:
        """Whether a line still waits for a page."""
        return any(number in self for number in self._by_page.get(page, ()))

    def pop_lines(self, page: str) -> list[int]:
        """Return the lines that wait for a page; a later page of the same name is ignored."""
        return [number for number in self._by_page.pop(page, ()) if number in self]

    def drop(self, number: int, cache: "_PageCache") -> None:
        """Remove a line and release its pages."""
        for page in self.pop(number).cached:
            cache.free(page)

    def incomplete(self) -> Iterator[tuple[int, str]]:
        """Yield the lines that are left, each with a page that is not in the archive."""
        first: dict[int, str] = {}
        for page, numbers in self._by_page.items():
            for number in numbers:
                first.setdefault(number, page)
        yield from ((number, first[number]) for number in sorted(self))


class _PageCache:
    """Pages of incomplete lines: in memory up to a limit, beyond it as files of a temporary folder."""

    def __init__(self, limit: int = _IN_MEMORY_BYTES) -> None:
        self.in_memory = 0
        self._limit = limit
        self._pages: dict[str, tuple[bytes | Path, str]] = {}
        self._users: dict[str, int] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="pages-")  # closed by __exit__
        self._files = 0

    def __enter__(self) -> "_PageCache":
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def add(self, page: str, image: tuple[bytes, str], *, users: int) -> None:
        """Keep a page until `users` lines have freed it."""
        data, ending = image
        kept: bytes | Path = data
        if self.in_memory + len(data) > self._limit:
            kept = Path(self._folder.name) / str(self._files)
            kept.write_bytes(data)
            self._files += 1
        else:
            self.in_memory += len(data)
        self._pages[page], self._users[page] = (kept, ending), users

    def get(self, page: str) -> EncodedImage:
        """Return a page that is kept."""
        kept, ending = self._pages[page]
        return (kept if isinstance(kept, bytes) else kept.read_bytes()), ending

    def free(self, page: str) -> None:
        """Release a page for one line; the last line removes it."""
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


_LIST = "train.jsonl"
_PIECES = "partial-imgs."
_LAYOUT = f"{_LIST} or val.jsonl beside {_PIECES}00, {_PIECES}01"


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="prepare docdownstream", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "input",
        help="train.jsonl or val.jsonl, or what holds it beside the archive's pieces: a folder, an address, or a "
        "dataset of the hub, mPLUG/DocDownstream-1.0",
    )
    parser.add_argument("--file", help=f"the lines of a folder or dataset (default: {_LIST})")
    pages = parser.add_mutually_exclusive_group()
    pages.add_argument(
        "--image-root",
        type=Path,
        help="folder the image paths are relative to (default: that of the lines, where no archive is beside them)",
    )
    pages.add_argument(
        "--archive",
        nargs="+",
        metavar="PIECE",
        help=f"all pieces: {_PIECES}00 {_PIECES}01, or a folder or dataset that holds them",
    )
    parser.add_argument("--sources", nargs="+", default=[], help="keep lines of these datasets only, such as DocVQA")
    add_options(parser)
    options = parser.parse_args(list(argv))
    print_yield(pack(_open_source(options), options))
    return 0


def _open_source(options: argparse.Namespace) -> RawData:
    chosen, pieces = _files(options)
    source = options.source or "docdownstream"
    if not pieces and not chosen.local and not options.image_root:
        raise ConfigError(
            f"{chosen.path} does not lie on this disk, and neither --archive nor --image-root says where its pages are"
        )
    lines = DocumentLines(
        path=fetched_list(chosen, PackOptions.from_args(options)),
        origin="" if chosen.local else chosen.path,
        sources=tuple(options.sources),
    )
    if pieces:
        return DocDownstreamArchive(lines=lines, pieces=tuple(pieces), source=source)
    root = options.image_root or Path(chosen.path).parent
    return DocDownstreamFolder(lines=lines, images=ImageFolder(root=root), source=source)


def _files(options: argparse.Namespace) -> tuple[StoredFile, list[StoredFile]]:
    """Return the file of the lines, and the pieces of the archive where the pages come from one."""
    given = [piece for place in options.archive or () for piece in _find_pieces(place)]
    if Path(options.input).is_file() or options.input.endswith(".jsonl"):
        if options.file:
            raise ConfigError(f"--file chooses a file of a folder or dataset, but {options.input} is one file")
        return find_file(options.input), given
    beside = list_folder(options.input)
    lines = choose_list(beside, options.file or _LIST, where=options.input, expected=_LAYOUT)
    pieces = given or [file for file in beside if file.name.startswith(_PIECES)]
    return lines, [] if options.image_root else pieces


def _find_pieces(place: str) -> list[StoredFile]:
    """Return the piece at a place, or all pieces that a folder or dataset holds."""
    if Path(place).is_file() or place.rpartition("/")[2].startswith(_PIECES):
        return [find_file(place)]
    found = list_folder(place)
    if pieces := [file for file in found if file.name.startswith(_PIECES)]:
        return pieces
    names = ", ".join(file.name for file in found[:12]) or "no files"
    raise DataError(f"--archive {place}: expected a piece, or {_PIECES}00 and so on in it, found {names}")
