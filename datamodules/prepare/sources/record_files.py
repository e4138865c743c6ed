"""Conversations of one file, of JSON on each line or in one JSON list, with images in a folder."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from ...shards.columns import LINES, Schema
from ...shards.sample import check_record
from .dialogues import check_answered, read_conversation
from .images import ImageFolder, image_names
from .json_files import RawRecord, is_list, parse_object, raw_elements, raw_lines
from .source import SourceSample


@dataclass(frozen=True, kw_only=True)
class RecordFile:
    """The records of a file as raw data; a kind overrides what differs."""

    path: Path
    image_root: Path = Path()  # image paths are relative to it
    source: str
    license: str = "unknown"
    origin: str = ""  # name of the file in errors; empty: its path
    start: int = 0  # records to skip, the first ones
    schema: ClassVar[Schema] = LINES

    @property
    def label(self) -> str:
        """Name of the file in errors."""
        return self.origin or str(self.path)

    @cached_property
    def listed(self) -> bool:
        """Whether the file is one JSON list."""
        return is_list(self.path)

    def where(self, number: int) -> str:
        """Name a record in errors."""
        return f"{self.label}, {'record' if self.listed else 'line'} {number}"

    def raw(self) -> Iterator[RawRecord]:
        """Yield the records."""
        return raw_elements(self.path) if self.listed else raw_lines(self.path)

    def inputs(self) -> Iterator[Path]:
        yield self.path

    def num_rows(self) -> int:
        self.check()
        return max(sum(1 for _ in self.raw()) - self.start, 0)

    def check(self) -> None:
        """Raise DataError where there is no such file, or its records are of another schema."""
        field = next(iter(self.schema.fields))
        self.schema.check_records(parsed(text for _, text in self.raw()), field, where=self.label)

    def marks_images(self) -> bool:
        """Return whether ``<image>`` stands for an image in records without a field of images."""
        return True

    def parts(self) -> list[Path]:
        return [self.path]

    def rows(self, part: Path) -> Iterator[tuple[int, bytes, bool]]:
        """Yield number and text of the records, and whether ``<image>`` stands for an image in them."""
        del part
        marked = self.marks_images()
        return ((number, text, marked) for number, text in islice(self.raw(), self.start, None))

    def sample(self, row: tuple[int, bytes, bool]) -> SourceSample | None:
        """Convert a record with its images, or raise SampleError; None if it is not wanted."""
        number, text, marked = row
        where = self.where(number)
        given = parse_object(text, where=where)
        if not self.is_wanted(given):
            return None
        paths, folder = image_names(given, where=where), ImageFolder(root=self.image_root)
        record = self.convert(given, number, num_images=len(paths), marked=marked)
        return SourceSample(record=record, images=[folder.read(path, where=where) for path in paths], where=where)

    def is_wanted(self, given: dict[str, Any]) -> bool:
        """Whether a record is read."""
        return True

    def convert(self, given: dict[str, Any], number: int, *, num_images: int, marked: bool) -> dict[str, Any]:
        """Convert a parsed record to the sample schema; `marked` as of `convert_docdownstream`."""
        where = self.where(number)
        record = read_conversation(given, num_images=num_images, where=where, marked=marked)
        check_record(record, num_images=num_images, where=where)
        check_answered(record, where=where)
        return record


def parsed(texts: Iterable[bytes]) -> Iterator[Any]:
    """Yield the values of texts of JSON; what is not JSON is skipped."""
    for text in texts:
        with contextlib.suppress(ValueError, RecursionError):
            yield json.loads(text)
