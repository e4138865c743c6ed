"""`prepare jsonl`: DocDownstream-style jsonl and its images -> shards and manifest, shuffled once for all.

One line is `{"image": ["a.png"], "messages": [{"role": "user", "content": "<|image|>Total?"}, {"role":
"assistant", "content": "12.50"}], "task_name": "qa_sft", "dataset_name": "DocVQA"}`, with optional
`references` (accepted answers) and `lines` (text lines of the first image). `images` may stand for `image`, `<image>`
for `<|image|>`, and the content of a turn may be the parts of the sample schema. Two runs give the same bytes.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from alignvlm_pl.errors import ConfigError, DataError

from ..shards.columns import LINES
from ..shards.sample import SampleError, check_record
from ..shards.sample_formats import IMAGE_PLACEHOLDER, convert_docdownstream
from .pack.engine import pack, print_yield
from .pack.options import add_options
from .sources.dialogues import IMAGE_TOKEN, check_answered
from .sources.images import ImageFolder, image_names
from .sources.json_files import parse_object, parsed_lines, raw_lines
from .sources.source import Part, SourceSample, or_error

_PART_BYTES = 8 * 2**20
_MEASURED_PARTS = 64
_MEASURED_RECORDS = 4


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
        return self.path.name

    def parts(self) -> list[Part]:
        """Cut the file into parts at line ends.

        Raises:
            ConfigError: `start` is negative.
            DataError: There is no such file, or its lines are of another schema.
        """
        if self.start < 0:
            raise ConfigError(f"start={self.start}: expected 0 or more")
        if not self.path.is_file():
            raise DataError(f"no such jsonl file: {self.path}")
        with self.path.open("rb") as stream:
            LINES.check_records(parsed_lines(stream), "messages", where=str(self.path))
        parts: list[Part] = []
        skip = self.start
        begin = offset = records = 0
        number = first = 1
        with self.path.open("rb") as stream:
            for number, text in enumerate(stream, start=1):
                if offset - begin >= self.part_bytes and records:
                    parts.append(_part(begin, offset, first, records))
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
            parts.append(_part(begin, offset, first, records))
        return parts

    def read(self, part: Part) -> Iterator[SourceSample | SampleError]:
        """Yield the records of a range of the file."""
        for number, text in self._lines(part):
            yield or_error(self._sample, text, f"{self.path}, line {number}")

    def input_bytes(self) -> int:
        """Estimate the size of the file and of its images, from a sample of records."""
        parts = self.parts()
        measured = parts[:: max(1, len(parts) // _MEASURED_PARTS)]
        sizes = [
            self._image_bytes(text) for part in measured for _, text in islice(self._lines(part), _MEASURED_RECORDS)
        ]
        records = sum(part.rows or 0 for part in parts)
        return self.spool_bytes() + (sum(sizes) * records // len(sizes) if sizes else 0)

    def spool_bytes(self) -> int:
        """Return the size of the file: images stay where they are."""
        return self.path.stat().st_size

    def _lines(self, part: Part) -> Iterator[tuple[int, bytes]]:
        begin, end, first = part.payload
        return ((number, text) for number, _, text in raw_lines(self.path, begin, end, first))

    def _sample(self, text: bytes, where: str) -> SourceSample:
        record = parse_object(text, where=where)
        paths = image_names(record, where=where)
        normal = convert_docdownstream(_replace_image_tokens(record, len(paths)), where=where)
        check_record(normal, num_images=len(paths), where=where)
        check_answered(normal, where=where)
        images = ImageFolder(root=self.image_root)
        return SourceSample(record=normal, images=[images.read(path, where=where) for path in paths])

    def _image_bytes(self, text: bytes) -> int:
        try:
            names = image_names(parse_object(text, where=""), where="")
            images = ImageFolder(root=self.image_root)
            return sum((self.image_root / images.relative(name, where="")).stat().st_size for name in names)
        except (SampleError, OSError):  # an invalid record takes no space
            return 0


def _part(begin: int, end: int, first: int, records: int) -> Part:
    return Part(name=f"bytes {begin}-{end}", payload=(begin, end, first), rows=records)


def _replace_image_tokens(record: dict[str, Any], num_images: int) -> dict[str, Any]:
    """Replace ``<image>`` (LLaVA, ms-swift) by ``<|image|>`` if only it occurs, once per image."""
    turns: Any = record.get("messages")
    plain = isinstance(turns, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in turns
    )
    if not plain or any(IMAGE_PLACEHOLDER in turn["content"] for turn in turns):
        return record
    if sum(turn["content"].count(IMAGE_TOKEN) for turn in turns) != num_images:
        return record
    spelled = [turn | {"content": turn["content"].replace(IMAGE_TOKEN, IMAGE_PLACEHOLDER)} for turn in turns]
    return record | {"messages": spelled}


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
