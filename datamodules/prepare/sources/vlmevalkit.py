"""VLMEvalKit's benchmark files: tab-separated rows with base64 pictures.

Format: docs/en/Development.md and vlmeval/dataset/image_base.py of open-compass/VLMEvalKit. Files of many gigabytes are
read row by row: one row is in memory at a time.
"""

import ast
import base64
import binascii
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from alignvlm_pl.benchmarks import Benchmark
from alignvlm_pl.benchmarks.rows import read_row
from alignvlm_pl.errors import DataError
from alignvlm_pl.scoring.tsv import TableRow, TabTable

from ...shards.sample import SampleError
from .source import SourceSample, checked_image

POINTER_LENGTH = 64
"""A shorter text in the image column is the index of the row that holds the picture."""


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
        table = _open(self.path)
        offsets, seen = _image_offsets(table), set()
        for row in table.rows():
            where = f"{self.path}, row {row.number}"
            index = row.cells.get("index", "")
            try:
                if row.problem:
                    raise SampleError(f"{where}: {row.problem}", "broken_row")
                if index and index in seen:
                    raise SampleError(f"{where}: index {index!r} is that of an earlier row", "repeated_index")
                seen.add(index)
                sample = self._sample(row, table, offsets, where)
            except SampleError as error:
                yield error
                continue
            if sample is not None:
                yield sample

    def _sample(
        self, row: TableRow, table: TabTable, offsets: Mapping[str, int], where: str
    ) -> SourceSample | None:
        question, references, meta = read_row(row.cells, self.benchmark)
        if not self.benchmark.belongs(meta):
            return None
        if not references:
            raise SampleError(f"{where}: the answer is empty: it cannot be scored", "no_answer")
        pictures = self._images(row.cells, table, offsets, where)
        images: list[tuple[bytes | Path, str]] = [checked_image(data, f"{where}: image") for data in pictures]
        content = [{"type": "image", "index": index} for index in range(len(images))]
        record = {
            "id": f"{self.path.stem}/{meta.get('index', '')}",
            "task": "vqa",
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
            "references": references,
            "meta": meta,
        }
        return SourceSample(record=record, images=images)

    def _images(
        self, row: Mapping[str, str], table: TabTable, offsets: Mapping[str, int], where: str
    ) -> list[bytes]:
        cells = _listed(row.get("image") or "")
        if not cells and (paths := _listed(row.get("image_path") or "")):
            return [self._file(path, where) for path in paths]
        if not cells:
            raise SampleError(f"{where}: neither image nor image_path is filled", "missing_image")
        return [image for cell in cells for image in _decoded(cell, table, offsets, where)]

    def _file(self, name: str, where: str) -> bytes:
        path = (self.image_root or self.path.parent) / name
        try:
            return path.read_bytes()
        except (OSError, ValueError) as error:  # the latter: names that no file can have
            raise SampleError(
                f"{where}: image {name!r:.200}: {error}; name its folder with --image-root", "missing_image"
            ) from error


def _open(path: Path) -> TabTable:
    table = TabTable(path)
    if "question" not in table.header or not {"image", "image_path"} & set(table.header):
        raise DataError(
            f"{path} is no table of VLMEvalKit: expected columns index, image or image_path, question, answer, "
            f"found {', '.join(table.header)[:200] or 'an empty file'}"
        )
    return table


def _image_offsets(table: TabTable) -> dict[str, int]:
    """Index of each row that holds a picture itself -> the byte where it begins."""
    if not {"index", "image"} <= set(table.header):
        return {}
    held = (row for row in table.rows() if len(row.cells.get("image", "")) > POINTER_LENGTH)
    return {row.cells["index"]: row.offset for row in held}


def _listed(cell: str) -> list[str]:
    """Return the elements of a cell: of the text of a Python list its own, of another text itself."""
    if not cell.startswith("["):
        return [cell] if cell else []
    try:
        found = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return [cell]
    return [str(item) for item in found] if isinstance(found, list) else [cell]


def _decoded(cell: str, table: TabTable, offsets: Mapping[str, int], where: str) -> list[bytes]:
    """Decode a picture, or those of the row that a short text points to, which must hold them itself."""
    if len(cell) > POINTER_LENGTH:
        return [_from_base64(cell, where)]
    if cell not in offsets:
        raise SampleError(
            f"{where}: the image points to row index {cell!r}, which has no picture", "bad_pointer"
        )
    held = _listed(next(table.rows(offsets[cell])).cells["image"])
    if any(len(own) <= POINTER_LENGTH for own in held):
        raise SampleError(
            f"{where}: the image points to row index {cell!r}, which itself points to another", "bad_pointer"
        )
    return [_from_base64(own, where) for own in held]


def _from_base64(cell: str, where: str) -> bytes:
    try:
        return base64.b64decode(cell, validate=True)
    except (binascii.Error, ValueError) as error:
        raise SampleError(f"{where}: the image is no base64 ({error})", "bad_base64") from error
