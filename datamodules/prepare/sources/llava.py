"""LLaVA's sets: the list of conversations of LLaVA-558K beside a folder, and the parquet files of LLaVA-NeXT.

Formats: liuhaotian/LLaVA-Pretrain `blip_laion_cc_sbu_558k.json`, one JSON list; lmms-lab/LLaVA-NeXT-Data, parquet with
`id`, `conversations`, `data_source`, `image`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...shards.columns import LLAVA
from ...shards.sample import SampleError
from ..pack.source import Part
from .dialogues import llava_turns
from .json_list import ListSlice, slice_list
from .parquet_rows import ParquetRows
from .pictures import Picture, PictureFolder, held_picture, total_bytes
from .source import SourceSample


@dataclass(frozen=True, kw_only=True, slots=True)
class LLaVARecords:
    """The records of a JSON list, wherever their pictures are.

    Attributes:
        path: The list.
        origin: What errors call the list; empty: by its path.
        name: Name of the set.
        source: Value of ``source`` for records without ``data_source``.
        license: Terms of the set.
    """

    path: Path
    origin: str = ""
    name: str = "llava"
    source: str = "llava"
    license: str = "unknown"

    @property
    def called(self) -> str:
        """What errors call the list."""
        return self.origin or str(self.path)


@dataclass(frozen=True, kw_only=True, slots=True)
class LLaVAList(LLaVARecords):
    """Records whose pictures lie in a folder.

    Attributes:
        pictures: Folder that the records' paths are relative to.
    """

    pictures: PictureFolder

    def parts(self) -> list[Part]:
        """Return a part for each few thousand records.

        Raises:
            DataError: The file is no JSON list, or its records are of another schema.
        """
        pieces = slice_list(self.path)
        for piece in pieces[:1]:
            LLAVA.check_records(piece.load(self.path), "conversations", where=self.called)
        return [
            Part(
                name=f"{self.path.name}#{piece.first}",
                payload=(piece.first, piece.records, piece.start, piece.end),
                rows=piece.records,
            )
            for piece in pieces
        ]

    def input_bytes(self) -> int:
        """Return the size of the list and of all pictures of the folder."""
        return self.path.stat().st_size + total_bytes(self.pictures.root)

    def spool_bytes(self) -> int:
        """Return the size of the list: pictures are read again from their files."""
        return self.path.stat().st_size

    def read(self, part: Part) -> Iterator[SourceSample | SampleError]:
        """Yield the records of a part."""
        first, records, start, end = (int(value or 0) for value in part.payload)
        piece = ListSlice(first=first, records=records, start=start, end=end)
        for number, record in enumerate(piece.load(self.path), start=piece.first):
            where = f"{self.called}, record {number}"
            try:
                yield self._sample(record, number, where)
            except SampleError as error:
                yield error

    def _sample(self, record: Any, number: int, where: str) -> SourceSample:
        readers = [
            partial(self.pictures.read, path, where=where) for path in check_paths(record, where=where)
        ]
        name = record.get("id", number)
        return llava_sample(record, readers, default=self.source, name=name, where=where)


@dataclass(frozen=True, kw_only=True)
class LLaVARows(ParquetRows):
    """The rows of parquet files; those without a picture are text only.

    Attributes:
        pictures: Folder of the pictures that rows only name; None: such rows are bad.
    """

    name: str = "llava-next"
    source: str = "llava-next"
    license: str = "Apache-2.0"
    pictures: PictureFolder | None = None
    schema = LLAVA
    optional = ("image", "data_source")

    def sample(self, row: Mapping[str, Any], columns: Mapping[str, str], *, where: str) -> SourceSample:
        """Convert a row."""
        held = row.get("image")
        # The hub writes a missing picture as null, or as {bytes: null, path: null}.
        there = any(held.values()) if isinstance(held, Mapping) else held is not None
        readers = [partial(_cell, held, self.pictures, where)] if there else []
        return llava_sample(row, readers, default=self.source, name=row[columns["id"]], where=where)


def check_paths(record: Any, *, where: str) -> list[str]:
    """Return the paths of a record's pictures.

    Raises:
        SampleError: It is no object, or names its pictures otherwise (``bad_row``).
    """
    if not isinstance(record, Mapping):
        raise SampleError(f"{where}: expected an object, found {record!r:.80}", "bad_row")
    named = record.get("image") or []
    paths = [named] if isinstance(named, str) else named
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise SampleError(
            f"{where}: 'image' must be a path or a list of paths, found {named!r:.80}", "bad_row"
        )
    return paths


def llava_sample(
    record: Mapping[str, Any],
    readers: Sequence[Callable[[], Picture]],
    *,
    default: str,
    name: Any,
    where: str,
) -> SourceSample:
    """Convert a record; its pictures are read when its turns are known to be of use.

    Raises:
        SampleError: It or a picture of it is of no use.
    """
    turns = llava_turns(record.get("conversations"), num_images=len(readers), where=where)
    source = str(record.get("data_source") or default)
    normal = {
        "id": f"{source}/{name}",
        "source": source,
        "task": "instruction",
        "messages": turns,
    }
    return SourceSample(record=normal, images=[read() for read in readers])


def _cell(cell: Any, folder: PictureFolder | None, where: str) -> Picture:
    if isinstance(cell, str) and folder is not None:
        return folder.read(cell, where=where)
    return held_picture(cell, where=where, folder=folder)
