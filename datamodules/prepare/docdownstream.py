"""`prepare docdownstream`: lines of DocDownstream-1.0, with pages in a folder or in the published archive -> shards.

The archive is streamed once, from its first byte to its last: it is neither joined nor unpacked on disk. For a dataset
of the hub only the file of lines is stored while the command runs.
"""

import argparse
import posixpath
import sys
import tempfile
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from alignvlm_pl.errors import ConfigError, DataError, nearest
from alignvlm_pl.preprocessing.images.source import describe_source

from ..shards.sample import SampleError
from ..shards.tar_walk import stream_files
from ..storage.file_kinds import path_text
from ..storage.stored_files import StoredFile, find_file, list_folder, ordered_pieces
from .input_files import fetched_list, find_list, first_names
from .pack.options import DEFAULT_WORKERS, PackOptions
from .sources.images import EncodedImage
from .sources.json_files import require_lines
from .sources.record_files import RecordFile, parsed
from .sources.source import Part, SourceSample, checked_image, or_error

_PART_LINES = 2048


@dataclass(frozen=True, kw_only=True)
class DocDownstreamFolder(RecordFile):
    """Lines whose pages lie in a folder."""

    name: str = "docdownstream"
    source: str = "docdownstream"
    license: str = "Apache-2.0"
    sources: tuple[str, ...] = ()  # values of `dataset_name` to keep; empty: all

    def check(self) -> None:
        """Check the schema of the lines; raise ConfigError where one of the `sources` does not occur."""
        require_lines(self.path)
        super().check()
        if not self.sources:
            return
        records = parsed(text for _, _, text in self.raw())
        names = {str(record.get("dataset_name")) for record in records if isinstance(record, Mapping)}
        for name in self.sources:
            if name not in names:
                raise ConfigError(f"--sources: {self.label} has no lines of {name!r}; {nearest(name, names)}")

    def is_full(self, records: int, size: int) -> bool:
        return records >= _PART_LINES

    def is_wanted(self, given: dict[str, Any]) -> bool:
        return not self.sources or given.get("dataset_name") in self.sources

    def convert(self, given: dict[str, Any], number: int, *, num_images: int, marked: bool) -> dict[str, Any]:
        record = super().convert(given, number, num_images=num_images, marked=marked)
        record.setdefault("id", f"{path_text(self.path.stem)}/{number}")
        return record


@dataclass(frozen=True, kw_only=True)
class DocDownstreamArchive(DocDownstreamFolder):
    """Lines whose pages lie in a tar in pieces."""

    pieces: tuple[StoredFile, ...]

    def parts(self) -> list[Part]:
        """Return one part: a stream cannot be entered in the middle."""
        if not self.pieces:
            raise ConfigError("name the pieces of the archive with --archive")
        ordered_pieces(self.pieces)
        self.check()
        return [Part(name=self.path.name, payload=(), rows=sum(1 for _ in self.raw()))]

    def input_bytes(self) -> int:
        """Estimate the bytes of all pages, counted once per line, from the size of the archive."""
        lines = (or_error(self.parse, text, number) for number, _, text in self.raw())
        pages = Counter(page for line in lines if isinstance(line, tuple) for page in line[1])
        return sum(piece.size for piece in self.pieces) * pages.total() // max(len(pages), 1)

    def spool_bytes(self) -> int:
        return self.input_bytes()

    def read(self, part: Part) -> Iterator[SourceSample | SampleError]:
        """Yield invalid lines, then samples in the order in which they complete, then lines with missing pages."""
        with tempfile.TemporaryDirectory(prefix="pages-") as folder:
            pending = _PendingLines(folder=Path(folder))
            for number, at, text in self.raw():
                line = or_error(self.parse, text, number)
                if isinstance(line, SampleError):
                    yield line
                elif line is not None and line[1]:
                    pending.add(number, at, map(_page, line[1]))
                elif line is not None:
                    yield SourceSample(record=line[0], images=[])
            yield from self._from_archive(pending)
            for number in sorted(pending.lines):
                missing = describe_source(min(pending.missing(number)))
                yield SampleError(f"{self.where(number)}: image {missing} is not in the archive", "missing_image")

    def _from_archive(self, pending: "_PendingLines") -> Iterator[SourceSample | SampleError]:
        files = stream_files(ordered_pieces(self.pieces), lambda name: bool(pending.waiting_for(_page(name))))
        for name, image in _decode_ahead(files):
            page = _page(name)
            numbers = pending.waiting_for(page)
            if isinstance(image, SampleError):
                for number in numbers:
                    pending.drop(number)
                    yield SampleError(f"{self.where(number)}: {image}", image.reason)
                continue
            complete = [number for number in numbers if not pending.missing(number) - {page}]
            if len(complete) < len(numbers):
                pending.keep(page, image)
            for number in complete:
                yield self._sample(number, {page: image}, pending)

    def _sample(self, number: int, images: dict[str, EncodedImage], pending: "_PendingLines") -> SourceSample:
        """Make the sample of a line from its last page and those that are kept."""
        at = pending.lines[number].offset
        line = next(self.parse(text, number) for _, _, text in self.raw(at, at + 1, number))
        assert line is not None  # it was valid when it was added
        pages = [_page(page) for page in line[1]]
        found = images | {page: pending.get(page) for page in pages if page not in images}
        pending.drop(number)
        return SourceSample(record=line[0], images=[found[page] for page in pages])


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


class _Line(NamedTuple):
    offset: int  # its first byte in the file
    pages: tuple[str, ...]


@dataclass(kw_only=True, slots=True)
class _PendingLines:
    """Lines that wait for pages, by number, and in files of a folder the pages that have passed and are needed."""

    folder: Path
    lines: dict[int, _Line] = field(default_factory=dict)
    _numbers: dict[str, list[int]] = field(default_factory=dict)
    _kept: dict[str, tuple[Path, str]] = field(default_factory=dict)
    _names: Iterator[int] = field(default_factory=count)

    def add(self, number: int, offset: int, pages: Iterable[str]) -> None:
        self.lines[number] = _Line(offset, tuple(dict.fromkeys(pages)))
        for page in self.lines[number].pages:
            self._numbers.setdefault(page, []).append(number)

    def waiting_for(self, page: str) -> list[int]:
        """Return the lines that wait for a page; of pages of one name the first one counts."""
        return [] if page in self._kept else list(self._numbers.get(page, ()))

    def missing(self, number: int) -> set[str]:
        """Return the pages that have not passed."""
        return set(self.lines[number].pages) - self._kept.keys()

    def keep(self, page: str, image: tuple[bytes, str]) -> None:
        """Keep a page until its last line is dropped."""
        path = self.folder / str(next(self._names))
        path.write_bytes(image[0])
        self._kept[page] = path, image[1]

    def get(self, page: str) -> EncodedImage:
        path, ending = self._kept[page]
        return path.read_bytes(), ending

    def drop(self, number: int) -> None:
        """Remove a line, and pages that no other one waits for."""
        for page in self.lines.pop(number).pages:
            self._numbers[page].remove(number)
            if not self._numbers[page] and page in self._kept:
                self._kept.pop(page)[0].unlink()


def _page(name: str) -> str:
    """Return the path of a page as lines and archive both write it, one text for all lines that name it."""
    return sys.intern(posixpath.normpath(name).removeprefix("/"))


_LIST = "train.jsonl"
_PIECES = "partial-imgs."
_LAYOUT = f"{_LIST} or val.jsonl beside {_PIECES}00, {_PIECES}01"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the kind."""
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


def open_source(options: argparse.Namespace) -> DocDownstreamFolder:
    """Return the raw data, or raise ConfigError where an option does not fit the others."""
    chosen, beside = find_list(options, _LIST, expected=_LAYOUT)
    given = [piece for place in options.archive or () for piece in _find_pieces(place)]
    pieces = given or ([] if options.image_root else _pieces(beside))
    if not pieces and not chosen.local and not options.image_root:
        raise ConfigError(
            f"{chosen.path} does not lie on this disk, and neither --archive nor --image-root says where its pages are"
        )
    fields: dict[str, Any] = {
        "path": fetched_list(chosen, PackOptions.from_args(options)),
        "origin": "" if chosen.local else chosen.path,
        "sources": tuple(options.sources),
        "source": options.source or "docdownstream",
    }
    if pieces:
        return DocDownstreamArchive(**fields, pieces=tuple(pieces))
    return DocDownstreamFolder(**fields, image_root=options.image_root or Path(chosen.path).parent)


def _find_pieces(place: str) -> list[StoredFile]:
    """Return the piece at a place, or all pieces that a folder or dataset holds."""
    if Path(place).is_file() or place.rpartition("/")[2].startswith(_PIECES):
        return [find_file(place)]
    files = list_folder(place)
    if pieces := _pieces(files):
        return pieces
    found = first_names(files)
    raise DataError(f"--archive {place}: expected a piece, or {_PIECES}00 and so on in it, found {found}")


def _pieces(files: Iterable[StoredFile]) -> list[StoredFile]:
    return [file for file in files if file.name.startswith(_PIECES)]
