"""DocDownstream's training lines, with their pages in a folder.

Format: mPLUG/DocDownstream-1.0, `train.jsonl` and `val.jsonl`: see `prepare jsonl`; docdownstream_archive.py reads the
pages from the archive instead.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignvlm_pl.errors import ConfigError, DataError, nearest

from ...shards.columns import LINES
from ...shards.sample import SampleError, check_record
from ...shards.sample_formats import convert_docdownstream
from ..pack.source import Part
from .dialogues import check_answered
from .jsonl import parsed_lines
from .pictures import PictureFolder
from .source import SourceSample

_PART_LINES = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentLine:
    """A line that is of use, without its pictures.

    Attributes:
        record: In normal form.
        pages: Paths of its pictures, in the order of their index.
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
        with self.path.open("rb") as stream:
            stream.seek(start)
            at = start
            for number, text in enumerate(stream, start=first):
                if end is not None and at >= end:
                    return
                if text.strip():
                    yield number, at, text
                at += len(text)

    def parse(self, text: bytes, number: int) -> DocumentLine | None:
        """Convert a line; None where its set is not asked for.

        Raises:
            SampleError: It is of no use.
        """
        where = self.where(number)
        try:
            given = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SampleError(f"{where}: not JSON ({error})", "bad_json") from error
        if not isinstance(given, Mapping):
            raise SampleError(f"{where}: expected an object, found {type(given).__name__}", "bad_json")
        if self.sources and given.get("dataset_name") not in self.sources:
            return None
        named = given.get("image") or given.get("images") or []
        pages = [named] if isinstance(named, str) else named
        if not isinstance(pages, list) or not all(isinstance(page, str) for page in pages):
            raise SampleError(f"{where}: 'image' must be a list of paths, found {named!r:.120}", "bad_row")
        record = convert_docdownstream(given, where=where)
        check_record(record, num_images=len(pages), where=where)
        check_answered(record, where=where)
        record.setdefault("id", f"{self.path.stem}/{number}")
        return DocumentLine(record=record, pages=pages)

    def check(self) -> None:
        """Check that the lines are conversations, and that the sets that are asked for are there.

        Raises:
            ConfigError: A set is not, with those that are.
            DataError: The lines are of another schema.
        """
        texts = (text for _, _, text in self.raw())
        LINES.check_records(parsed_lines(texts), "messages", where=self.origin or str(self.path))
        if not self.sources:
            return
        names: Counter[str] = Counter()
        for _, _, text in self.raw():
            try:
                names[str(json.loads(text).get("dataset_name"))] += 1
            except (ValueError, AttributeError, RecursionError):
                continue  # such lines are counted as bad where they are read
        for name in self.sources:
            if name not in names:
                raise ConfigError(
                    f"--sources: {self.origin or self.path} has no lines of {name!r}; {nearest(name, names)}"
                )

    def pages(self) -> Counter[str]:
        """Return how many lines ask about each page."""
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
class DocDownstreamFolder:
    """Lines whose pages lie in a folder.

    Attributes:
        lines: The lines.
        pictures: Folder that the lines' paths are relative to.
        name: Name of the set.
        source: Value of ``source`` for lines without ``dataset_name``.
        license: Terms of the set.
    """

    lines: DocumentLines
    pictures: PictureFolder
    name: str = "docdownstream"
    source: str = "docdownstream"
    license: str = "Apache-2.0"

    def parts(self) -> list[Part]:
        """Return a part for each few thousand lines.

        Raises:
            ConfigError: A set that is asked for is not there.
            DataError: No such file, or its lines are of another schema.
        """
        self.lines.check()
        found = [(number, at, at + len(text)) for number, at, text in self.lines.raw()]
        pieces = [found[at : at + _PART_LINES] for at in range(0, len(found), _PART_LINES)]
        return [
            Part(
                name=f"{self.lines.path.name}#{piece[0][0]}",
                payload=(piece[0][0], piece[0][1], piece[-1][2]),
                rows=len(piece),
            )
            for piece in pieces
        ]

    def input_bytes(self) -> int:
        """Return the size of all pages, each as often as lines ask about it: shards hold it that often."""
        root = self.pictures.root
        paths = ((root / page, count) for page, count in self.lines.pages().items())
        return sum(path.stat().st_size * count for path, count in paths if path.is_file())

    def spool_bytes(self) -> int:
        """Return the size of the lines: pages are read again from their files."""
        return self.lines.path.stat().st_size

    def read(self, part: Part) -> Iterator[SourceSample | SampleError]:
        """Yield the lines of a part; lines of other sets are passed over."""
        first, start, end = (int(value or 0) for value in part.payload)
        for number, _, text in self.lines.raw(start, end, first):
            where = self.lines.where(number)
            try:
                line = self.lines.parse(text, number)
                if line is not None:
                    images = [self.pictures.read(page, where=where) for page in line.pages]
                    yield SourceSample(record=line.record, images=images)
            except SampleError as error:
                yield error
