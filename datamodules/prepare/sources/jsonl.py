"""DocDownstream-style jsonl: one record per line, images in a folder.

One line is `{"image": ["a.png"], "messages": [{"role": "user", "content": "<|image|>Total?"}, {"role":
"assistant", "content": "12.50"}], "task_name": "qa_sft", "dataset_name": "DocVQA"}`, with optional
`references` (accepted answers) and `lines` (text lines of the first image). `images` may stand for `image`, `<image>`
for `<|image|>`, and the content of a turn may be the parts of the sample schema.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from alignvlm_pl.errors import ConfigError, DataError

from ...shards.columns import LINES
from ...shards.sample import SampleError, check_record
from ...shards.sample_formats import IMAGE_PLACEHOLDER, convert_docdownstream
from ...shards.shard_file import EXTENSIONS
from .dialogues import IMAGE_TOKEN, check_answered
from .images import EncodedImage, ImageFolder, safe_path
from .source import Part, SourceSample

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
            try:
                yield self._sample(text, f"{self.path}, line {number}")
            except SampleError as error:
                yield error

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
        begin, end, number = (int(value or 0) for value in part.payload)
        with self.path.open("rb") as stream:
            stream.seek(begin)
            while begin < end and (text := stream.readline()):
                if text.strip():
                    yield number, text
                begin, number = begin + len(text), number + 1

    def _sample(self, text: bytes, where: str) -> SourceSample:
        record = _parse(text, where)
        paths = _paths(record, where)
        normal = convert_docdownstream(_replace_image_tokens(record, len(paths)), where=where)
        check_record(normal, num_images=len(paths), where=where)
        check_answered(normal, where=where)
        return SourceSample(record=normal, images=[self._image(path, where) for path in paths])

    def _image(self, name: str, where: str) -> EncodedImage:
        if safe_path(name, where=where).suffix.lower().lstrip(".") not in EXTENSIONS:
            raise SampleError(f"{where}: image {name} is no {', '.join(EXTENSIONS)} file", "image_format")
        return ImageFolder(root=self.image_root).read(name, where=where)

    def _image_bytes(self, text: bytes) -> int:
        try:
            names = _paths(_parse(text, ""), "")
            return sum((self.image_root / safe_path(name, where="")).stat().st_size for name in names)
        except (SampleError, OSError):  # an invalid record takes no space
            return 0


def _part(begin: int, end: int, first: int, records: int) -> Part:
    return Part(name=f"bytes {begin}-{end}", payload=(begin, end, first), rows=records)


def _parse(text: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SampleError(f"{where}: not JSON ({error})", "bad_json") from error
    if not isinstance(record, dict):
        raise SampleError(f"{where}: expected an object, found {type(record).__name__}", "bad_json")
    return record


def parsed_lines(lines: Iterable[bytes]) -> Iterator[Any]:
    """Yield the parsed lines; lines that are not JSON are skipped."""
    for text in lines:
        with contextlib.suppress(ValueError, RecursionError):
            yield json.loads(text)


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


def _paths(record: dict[str, Any], where: str) -> list[str]:
    named = record.get("image") or record.get("images") or []
    paths = [named] if isinstance(named, str) else named
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise SampleError(f"{where}: 'image' must be a list of paths, found {named!r:.120}")
    return paths
