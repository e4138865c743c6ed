"""`prepare jsonl`: DocDownstream-style jsonl and its images -> shards and manifest, shuffled once for all.

One line is `{"image": ["a.png"], "messages": [{"role": "user", "content": "<|image|>Total?"}, {"role":
"assistant", "content": "12.50"}], "task_name": "qa_sft", "dataset_name": "DocVQA"}`, with optional
`references` (accepted answers) and `lines` (text lines of the first image). `images` may stand for `image`, `<image>`
for `<|image|>`, LLaVA's `conversations` for `messages`, parts of the sample schema for the content of a turn, and a
JSON list for the lines. Two runs give the same bytes.
"""

import argparse
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from alignvlm_pl.errors import DataError

from ..shards.columns import CHECKED_RECORDS, LINES
from ..shards.sample import SampleError, check_record
from ..shards.sample_formats import IMAGE_TOKEN, names_images
from ..storage.file_kinds import path_text
from .pack.engine import pack, print_yield
from .pack.options import add_options, require_at_least
from .sources.dialogues import check_answered, read_conversation
from .sources.images import ImageFolder, image_names
from .sources.json_files import (
    ListSlice,
    check_object,
    is_list,
    parse_object,
    parsed_lines,
    raw_lines,
    slice_list,
)
from .sources.source import Part, SourceSample, or_error

_PART_BYTES = 8 * 2**20
_MEASURED_PARTS = 64
_MEASURED_RECORDS = 4
# `<` may be escaped.
_TOKEN = re.compile(rb"(?:<|\\u003[cC])image")


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonlData:
    """The records of a file.

    Attributes:
        path: The file.
        image_root: Folder that image paths are relative to.
        source: ``source`` of records without ``dataset_name``.
        license: Terms of the data.
        start: Skip this many records, the first ones.
        part_bytes: Bytes of the file that one process reads at a time.
    """

    path: Path
    image_root: Path
    source: str
    license: str = "unknown"
    start: int = 0
    part_bytes: int = _PART_BYTES

    @property
    def name(self) -> str:
        """Name of the file."""
        return path_text(self.path.name)

    def parts(self) -> list[Part]:
        """Cut the file into parts at line ends; or a JSON list, whatever its name, at its elements.

        Raises:
            ConfigError: `start` is negative.
            DataError: There is no such file, or its lines are of another schema.
        """
        require_at_least(0, start=self.start)
        if not self.path.is_file():
            raise DataError(f"no such jsonl file: {self.path}")
        if is_list(self.path):
            return self._list_parts()
        head = islice(raw_lines(self.path), CHECKED_RECORDS)
        LINES.check_records(list(parsed_lines(text for _, _, text in head)), "messages", where=str(self.path))
        parts: list[Part] = []
        marked = _marks_images(parsed_lines(text for _, _, text in raw_lines(self.path) if _TOKEN.search(text)))
        skip = self.start
        begin = offset = records = 0
        number = first = 1
        with self.path.open("rb") as stream:
            for number, text in enumerate(stream, start=1):
                if offset - begin >= self.part_bytes and records:
                    parts.append(_part(begin, offset, first, records, marked))
                    begin, first, records = offset, number, 0
                offset += len(text)
                if not text.strip():
                    continue
                if skip:
                    skip -= 1
                    begin, first = offset, number + 1
                else:
                    records += 1
        if records:
            parts.append(_part(begin, offset, first, records, marked))
        return parts

    def _list_parts(self) -> list[Part]:
        """Cut a JSON list."""
        pieces = slice_list(self.path)
        for piece in pieces[:1]:
            LINES.check_records(piece.load(self.path), "messages", where=str(self.path))
        marked = _marks_images(record for piece in pieces for record in piece.load(self.path))
        parts: list[Part] = []
        for piece in pieces:
            begin, end = max(piece.first, self.start), piece.first + piece.records
            if begin < end:
                parts.append(Part(name=f"records {begin}-{end}", payload=(marked, *piece), rows=end - begin))
        return parts

    def read(self, part: Part) -> Iterator[SourceSample | SampleError]:
        """Yield the records of a range of the file."""
        for where, record in self._records(part):
            if isinstance(record, SampleError):
                yield record
            else:
                yield or_error(self._sample, record, where, marked=part.payload[0])

    def input_bytes(self) -> int:
        """Estimate the size of the file and of its images, from a sample of records."""
        parts = self.parts()
        measured = parts[:: max(1, len(parts) // _MEASURED_PARTS)]
        sizes = [
            self._image_bytes(found) for part in measured for _, found in islice(self._records(part), _MEASURED_RECORDS)
        ]
        records = sum(part.rows or 0 for part in parts)
        return self.spool_bytes() + (sum(sizes) * records // len(sizes) if sizes else 0)

    def spool_bytes(self) -> int:
        """Return the size of the file: images stay where they are."""
        return self.path.stat().st_size

    def _records(self, part: Part) -> Iterator[tuple[str, dict[str, Any] | SampleError]]:
        """Yield (name for errors, record) of a part: of elements of a list, else of lines."""
        place = part.payload[1:]
        if len(place) == len(ListSlice._fields):
            piece = ListSlice(*place)
            for number, record in enumerate(piece.load(self.path), start=piece.first):
                where = f"{self.path}, record {number}"
                if number >= self.start:
                    yield where, or_error(check_object, record, where=where)
            return
        begin, end, first = place
        for number, _, text in raw_lines(self.path, begin, end, first):
            where = f"{self.path}, line {number}"
            yield where, or_error(parse_object, text, where=where)

    def _sample(self, record: dict[str, Any], where: str, *, marked: bool) -> SourceSample:
        paths = image_names(record, where=where)
        normal = read_conversation(record, num_images=len(paths), where=where, marked=marked)
        check_record(normal, num_images=len(paths), where=where)
        check_answered(normal, where=where)
        images = ImageFolder(root=self.image_root)
        return SourceSample(record=normal, images=[images.read(path, where=where) for path in paths])

    def _image_bytes(self, record: dict[str, Any] | SampleError) -> int:
        if isinstance(record, SampleError):
            return 0
        try:
            names = image_names(record, where="")
            images = ImageFolder(root=self.image_root)
            return sum((self.image_root / images.relative(name, where="")).stat().st_size for name in names)
        except (SampleError, OSError):  # an invalid record takes no space
            return 0


def _marks_images(records: Iterable[Any]) -> bool:
    """Return whether ``<image>`` stands for an image in one of the records of a file."""
    found = (record for record in records if isinstance(record, dict) and names_images(record))
    return any(IMAGE_TOKEN in str(record.get(name, "")) for record in found for name in LINES.fields["messages"])


def _part(begin: int, end: int, first: int, records: int, marked: bool) -> Part:
    return Part(name=f"bytes {begin}-{end}", payload=(marked, begin, end, first), rows=records)


def main(argv: Sequence[str]) -> int:
    """Command line of `prepare jsonl`; prints what was written and what was skipped."""
    parser = argparse.ArgumentParser(prog="prepare jsonl", description=__doc__, allow_abbrev=False)
    parser.add_argument("jsonl", type=Path, help="file with one record per line")
    parser.add_argument(
        "--image-root", type=Path, help="folder the image paths are relative to (default: the file's folder)"
    )
    parser.add_argument("--start", type=int, default=0, help="skip the first records of the file")
    add_options(parser)
    options = parser.parse_args(list(argv))
    raw = JsonlData(
        path=options.jsonl,
        image_root=options.image_root or options.jsonl.parent,
        source=options.source or options.name or options.out.resolve().name,
        start=options.start,
    )
    print_yield(pack(raw, options))
    return 0
