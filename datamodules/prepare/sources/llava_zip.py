"""LLaVA-558K's list with its pictures in one zip, on this disk or elsewhere, which is read in its own order.

Reading it in the list's order would be a request for each of half a million pictures.
"""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

from alignvlm_pl.errors import DataError

from ...shards.columns import LLAVA
from ...shards.sample import SampleError
from ...storage.stored_files import StoredFile
from ...storage.stored_stream import StoredStream
from ..pack.source import Part
from .json_list import element_ranges
from .llava import LLaVARecords, check_paths, llava_sample
from .pictures import Picture, safe_path
from .source import SourceSample, checked_image
from .zipped import ZipPlace, read_directory, read_member

_PART_RECORDS = 2048
_CHECKED_RECORDS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class LLaVAZip(LLaVARecords):
    """Records in the order in which a zip holds their first pictures.

    Attributes:
        zip: The zip; its members' names are the records' paths, or those below one folder named as the zip is.
    """

    zip: StoredFile

    def parts(self) -> list[Part]:
        """Return a part for each few thousand records.

        Raises:
            DataError: The list is no JSON list, of another schema, or names no picture of the zip; or that is no zip.
        """
        ranges = list(element_ranges(self.path))
        found = _Named(stem=Path(self.zip.name).stem, places=read_directory(self.zip))
        with self.path.open("rb") as stream:
            first = (_load(stream, start, end) for start, end in ranges[:_CHECKED_RECORDS])
            LLAVA.check_records(first, "conversations", where=self.called)
            rows = [
                (number, start, end, found.places_of(_load(stream, start, end)))
                for number, (start, end) in enumerate(ranges)
            ]
        if found.missing and not found.found:
            raise DataError(
                f"{self.zip.path} holds none of the pictures of {self.called}: expected such as "
                f"{found.missing!r}, found such as {next(iter(found.places), 'no file')!r}"
            )
        # Each part lies together in the zip, which it reads forward.
        rows.sort(key=lambda row: (row[3][0][0] if row[3] and row[3][0] else -1, row[0]))
        rest, parts = iter(rows), list[Part]()
        while piece := list(islice(rest, _PART_RECORDS)):
            # One text: parts hold plain values.
            name = f"{self.path.name}#{len(parts)}"
            parts.append(Part(name=name, payload=(json.dumps(piece),), rows=len(piece)))
        return parts

    def input_bytes(self) -> int:
        """Return the size of list and zip."""
        return self.path.stat().st_size + self.zip.size

    def read(self, part: Part) -> Iterator[SourceSample | SampleError]:
        """Yield the records of a part.

        Raises:
            DataError: The store that the zip lies in does not give it.
        """
        with self.path.open("rb") as records, closing(StoredStream(self.zip)) as pictures:
            for number, start, end, places in json.loads(str(part.payload[0])):
                where = f"{self.called}, record {number}"
                try:
                    yield self._sample(_load(records, start, end), number, places, pictures, where)
                except SampleError as error:
                    yield error

    def _sample(
        self, record: Any, number: int, places: list[list[int] | None], pictures: StoredStream, where: str
    ) -> SourceSample:
        readers = [
            partial(self._picture, path, place, pictures, where)
            for path, place in zip(check_paths(record, where=where), places, strict=True)
        ]
        name = record.get("id", number)
        return llava_sample(record, readers, default=self.source, name=name, where=where)

    def _picture(self, path: str, place: list[int] | None, pictures: StoredStream, where: str) -> Picture:
        safe_path(path, where=where)
        if place is None:
            raise SampleError(f"{where}: image {path} is not in {self.zip.path}", "missing_image")
        offset, packed, size, crc, method, flags = place
        member = ZipPlace(offset=offset, packed=packed, size=size, crc=crc, method=method, flags=flags)
        called = f"{where}: image {path}"
        return checked_image(read_member(pictures, member, where=called), called)


@dataclass(kw_only=True, slots=True)
class _Named:
    """Members of a zip by the paths of records."""

    stem: str
    places: dict[str, ZipPlace]
    found: int = 0
    missing: str = ""

    def places_of(self, record: Any) -> list[tuple[int, ...] | None]:
        """Return where the pictures of a record lie; None for what is not there or is no path of a member."""
        try:
            paths = check_paths(record, where="")
        except SampleError:  # it is counted where it is read
            return []
        return [self._place(path) for path in paths]

    def _place(self, path: str) -> tuple[int, ...] | None:
        try:
            name = str(safe_path(path, where=""))
        except SampleError:
            return None
        place = self.places.get(name) or self.places.get(f"{self.stem}/{name}")
        if place is None:
            self.missing = self.missing or path
            return None
        self.found += 1
        return (place.offset, place.packed, place.size, place.crc, place.method, place.flags)


def _load(stream: IO[bytes], start: int, end: int) -> Any:
    stream.seek(start)
    try:
        return json.loads(stream.read(end - start))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{stream.name}: the record at byte {start} is not JSON ({error})") from error
