"""VLMEvalKit's benchmark files: tab-separated rows with base64 pictures.

Format: docs/en/Development.md and vlmeval/dataset/image_base.py of open-compass/VLMEvalKit. Files of many gigabytes are
read row by row: one row is in memory at a time.
"""

import ast
import base64
import binascii
import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from alignvlm_pl.benchmarks import Benchmark
from alignvlm_pl.benchmarks.rows import read_row
from alignvlm_pl.errors import DataError

from ..sample import SampleError
from .source import SourceSample, checked_image

POINTER_LENGTH = 64
"""A shorter text in the image column is the index of the row that holds the picture."""
_MAX_FIELD = 2**31 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class VLMEvalKitTable:
    """The rows of a file.

    Attributes:
        path: The file.
        benchmark: Decides how answers are read, and which rows belong to it.
        image_root: Folder of the files named in an ``image_path`` column.
    """

    path: Path
    benchmark: Benchmark
    image_root: Path | None = None

    def __iter__(self) -> Iterator[SourceSample | SampleError]:
        """Yield the rows of the benchmark in the order of the file, and the errors of bad ones.

        Raises:
            DataError: The file is no such table.
        """
        rows = _Table(self.path)
        offsets = rows.image_offsets()
        with self.path.open("rb") as stream:
            for number, row in rows.records(stream):
                where = f"{self.path}, row {number}"
                try:
                    if isinstance(row, SampleError):
                        raise row
                    sample = self._sample(row, rows, offsets, where)
                except SampleError as error:
                    yield error
                    continue
                if sample is not None:
                    yield sample

    def _sample(
        self, row: Mapping[str, str], rows: "_Table", offsets: Mapping[str, int], where: str
    ) -> SourceSample | None:
        question, references, meta = read_row(row, self.benchmark)
        if not self.benchmark.belongs(meta):
            return None
        if not references:
            raise SampleError(f"{where}: the answer is empty: it cannot be scored", "no_answer")
        images = [checked_image(data, f"{where}: image") for data in self._images(row, rows, offsets, where)]
        content = [{"type": "image", "index": index} for index in range(len(images))]
        record = {
            "id": f"{self.path.stem}/{row.get('index', '')}",
            "task": "vqa",
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
            "references": references,
            "meta": meta,
        }
        return SourceSample(record=record, images=images)

    def _images(
        self, row: Mapping[str, str], rows: "_Table", offsets: Mapping[str, int], where: str
    ) -> list[bytes]:
        cells = _listed(row.get("image") or "")
        if not cells and (paths := _listed(row.get("image_path") or "")):
            return [self._file(path, where) for path in paths]
        if not cells:
            raise SampleError(f"{where}: neither image nor image_path is filled", "missing_image")
        return [image for cell in cells for image in _decoded(cell, rows, offsets, where)]

    def _file(self, name: str, where: str) -> bytes:
        path = (self.image_root or self.path.parent) / name
        try:
            return path.read_bytes()
        except OSError as error:
            raise SampleError(
                f"{where}: image {path}: {error.strerror}; name its folder with --image-root", "missing_image"
            ) from error


class _Table:
    """Rows of a tab-separated file, by the byte where they begin."""

    def __init__(self, path: Path) -> None:
        csv.field_size_limit(_MAX_FIELD)
        self.path = path
        with path.open("rb") as stream:
            self.header = next(csv.reader(_Lines(stream), delimiter="\t"), [])
        if "question" not in self.header or not {"image", "image_path"} & set(self.header):
            raise DataError(
                f"{path} is no table of VLMEvalKit: expected columns index, image or image_path, question, answer, "
                f"found {', '.join(self.header)[:200] or 'an empty file'}"
            )

    def records(self, stream: IO[bytes]) -> Iterator[tuple[int, dict[str, str] | SampleError]]:
        """Yield number and cells of each row, the first after the header being row 2."""
        for number, _, cells in self._cells(stream):
            yield number, self._row(cells, f"{self.path}, row {number}")

    def image_offsets(self) -> dict[str, int]:
        """Index of each row that holds a picture itself -> the byte where it begins."""
        if not {"index", "image"} <= set(self.header):
            return {}
        index, image = self.header.index("index"), self.header.index("image")
        with self.path.open("rb") as stream:
            return {
                cells[index]: offset
                for _, offset, cells in self._cells(stream)
                if len(cells) == len(self.header) and len(cells[image]) > POINTER_LENGTH
            }

    def image_at(self, offset: int) -> str:
        """Return the image cell of the row that begins at a byte."""
        with self.path.open("rb") as stream:
            stream.seek(offset)
            cells: list[str] = next(csv.reader(_Lines(stream), delimiter="\t"))
        return cells[self.header.index("image")]

    def _cells(self, stream: IO[bytes]) -> Iterator[tuple[int, int, list[str]]]:
        lines = _Lines(stream)
        reader, number, offset = csv.reader(lines, delimiter="\t"), 1, 0
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except (csv.Error, UnicodeDecodeError) as error:
                raise DataError(f"{self.path}, row {number}: does not read as text ({error})") from error
            if number > 1 and cells:
                yield number, offset, cells
            number, offset = number + 1, lines.offset

    def _row(self, cells: list[str], where: str) -> dict[str, str] | SampleError:
        if len(cells) != len(self.header):
            return SampleError(
                f"{where}: expected {len(self.header)} columns, found {len(cells)}", "broken_row"
            )
        return dict(zip(self.header, cells, strict=True))


class _Lines:
    """Lines of a file as text; knows the byte after the last one taken, which csv's own reading does not tell."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.offset = stream.tell()

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._stream.readline()
        if not line:
            raise StopIteration
        self.offset += len(line)
        return line.decode("utf-8-sig" if self.offset == len(line) else "utf-8")


def _listed(cell: str) -> list[str]:
    """Return the elements of a cell: of the text of a Python list its own, of another text itself."""
    if not cell.startswith("["):
        return [cell] if cell else []
    try:
        found = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return [cell]
    return [str(item) for item in found] if isinstance(found, list) else [cell]


def _decoded(cell: str, rows: _Table, offsets: Mapping[str, int], where: str) -> list[bytes]:
    """Decode a picture, or those of the row that a short text points to."""
    if len(cell) > POINTER_LENGTH:
        try:
            return [base64.b64decode(cell, validate=True)]
        except (binascii.Error, ValueError) as error:
            raise SampleError(f"{where}: the image is no base64 ({error})", "bad_base64") from error
    if cell not in offsets:
        raise SampleError(
            f"{where}: the image points to row index {cell!r}, which has no picture", "bad_pointer"
        )
    return [
        image
        for own in _listed(rows.image_at(offsets[cell]))
        for image in _decoded(own, rows, offsets, where)
    ]
