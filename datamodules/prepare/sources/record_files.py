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
from ...shards.sample import SampleError, check_record
from .dialogues import check_answered, read_conversation
from .images import ImageFolder, image_names
from .json_files import RawRecord, is_list, parse_object, raw_elements, raw_lines
from .source import Part, SourceSample, or_error

PART_RECORDS = 4096
_MEASURED_PARTS = 64
_MEASURED_RECORDS = 4


@dataclass(frozen=True, kw_only=True)
class RecordFile:
    """The records of a file as raw data; a kind overrides what differs."""

    path: Path
    image_root: Path = Path()  # image paths are relative to it
    source: str
    license: str = "unknown"
    origin: str = ""  # name of the file in errors; empty: its path
    start: int = 0  # records to skip, the first ones
    part_bytes: int = 8 * 2**20  # about the bytes of the file that one process reads at a time
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

    def raw(self, *place: int) -> Iterator[RawRecord]:
        """Yield the records; `place` is start, end and number of the first one, as of `raw_lines`."""
        return raw_elements(self.path, *place) if self.listed else raw_lines(self.path, *place)

    def check(self) -> None:
        """Raise DataError where there is no such file, or its records are of another schema."""
        field = next(iter(self.schema.fields))
        self.schema.check_records(parsed(text for _, _, text in self.raw()), field, where=self.label)

    def is_full(self, records: int, size: int) -> bool:
        """Whether a part of so many records and bytes is cut."""
        return records >= PART_RECORDS if self.listed else size >= self.part_bytes

    def part_name(self, first: int, records: int, begin: int, end: int) -> str:
        """Return the name of a part, by number of its first record, number of records, first byte and end."""
        return f"{self.path.name}#{first}"

    def marks_images(self) -> bool:
        """Return whether ``<image>`` stands for an image in records without a field of images."""
        return True

    def parts(self) -> list[Part]:
        self.check()
        marked = self.marks_images()
        cuts: list[list[int]] = []
        for number, at, text in islice(self.raw(), self.start, None):
            if not cuts or self.is_full(cuts[-1][1], at - cuts[-1][2]):
                cuts.append([number, 0, at, at])
            cuts[-1][1] += 1
            cuts[-1][3] = at + len(text)
        return [
            Part(name=self.part_name(first, records, begin, end), payload=(marked, begin, end, first), rows=records)
            for first, records, begin, end in cuts
        ]

    def read(self, part: Part) -> Iterator[SourceSample | SampleError]:
        marked, *place = part.payload
        for number, _, text in self.raw(*place):
            found = or_error(self.sample, text, number, marked=marked)
            if found is not None:
                yield found

    def sample(self, text: bytes, number: int, *, marked: bool) -> SourceSample | None:
        """Convert a record with its images, or raise SampleError; None if it is not wanted."""
        where = self.where(number)
        given = parse_object(text, where=where)
        if not self.is_wanted(given):
            return None
        paths, folder = image_names(given, where=where), ImageFolder(root=self.image_root)
        record = self.convert(given, number, num_images=len(paths), marked=marked)
        return SourceSample(record=record, images=[folder.read(path, where=where) for path in paths])

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

    def input_bytes(self) -> int:
        parts = self.parts()
        measured = parts[:: max(1, len(parts) // _MEASURED_PARTS)]
        sizes = [
            self._image_bytes(text)
            for part in measured
            for _, _, text in islice(self.raw(*part.payload[1:]), _MEASURED_RECORDS)
        ]
        records = sum(part.rows or 0 for part in parts)
        return self.spool_bytes() + (sum(sizes) * records // len(sizes) if sizes else 0)

    def spool_bytes(self) -> int:
        return self.path.stat().st_size

    def _image_bytes(self, text: bytes) -> int:
        try:
            names = image_names(given, where="") if self.is_wanted(given := parse_object(text, where="")) else []
            images = ImageFolder(root=self.image_root)
            return sum((self.image_root / images.relative(name, where="")).stat().st_size for name in names)
        except (SampleError, OSError):  # an invalid record takes no space
            return 0


def parsed(texts: Iterable[bytes]) -> Iterator[Any]:
    """Yield the values of texts of JSON; what is not JSON is skipped."""
    for text in texts:
        with contextlib.suppress(ValueError, RecursionError):
            yield json.loads(text)
