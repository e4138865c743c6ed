"""First pass: the rows of the raw data -> samples in the order of the rows, in tars of the working folder.

This process reads the rows and writes the samples; others convert them. A tar is finished when its report is there,
which counts all rows so far: a resumed run reads on after them.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from alignvlm_pl.errors import DataError
from alignvlm_pl.utils.atomic_files import atomic_path, write_atomically

from ...shards.sample import SampleError
from ...shards.shard_file import ShardSample, add_members, shard_sample
from ...shards.writer import space_error
from ..sources.source import RawData
from .options import PackOptions
from .overlap import BenchmarkImages
from .processes import run_jobs
from .report import Report
from .work_folder import WorkFolder, write_array

ROW = np.dtype([("order", "<u8"), ("id", "<u8"), ("row", "<u8"), ("tar", "<u4"), ("offset", "<u8"), ("size", "<u4")])
"""One sample: hash that orders it, hash of its id (0 = none), number of its row; its tar there, offset and bytes."""
TAR_SAMPLES = 4096
TAR_BYTES = 512 * 2**20
_ROWS_OF_A_TAR = 16 * TAR_SAMPLES
"""Rows after which a tar ends, however few of them are samples."""
_BATCH = 4
"""Rows that a process converts at a time; with images they take megabytes each."""
_LARGEST = 2**32 - 1


class RawRow(NamedTuple):
    """A row that is not converted: its number, the number of its part, rows of the part up to it, and the row."""

    number: int
    part: int
    part_rows: int
    row: Any


class ConvertedRow(NamedTuple):
    """A row after its conversion: a sample, or the error of an invalid row or of a part that does not read on.

    It has neither if it is not wanted. `like` is the image of a benchmark that one of its own resembles.
    """

    place: RawRow
    sample: ShardSample | None = None
    error: DataError | None = None
    like: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertJob:
    """Converts rows and compares them with the images of benchmarks; an object, as it is sent to other processes."""

    raw: RawData
    options: PackOptions
    known: BenchmarkImages | None = None

    def __call__(self, rows: list[RawRow]) -> list[ConvertedRow]:
        """Convert rows."""
        return [self._convert(row._replace(row=None), row.row) for row in rows]

    def _convert(self, place: RawRow, row: Any) -> ConvertedRow:
        like = None
        try:
            if isinstance(row, DataError):
                raise row
            item = self.raw.sample(row)
            if item is None:
                return ConvertedRow(place)
            data = [image for image, _ in item.images]
            sample = shard_sample(
                {"id": unnamed(self.options.name), **item.record},
                data,
                [ending for _, ending in item.images],
                key=f"{self.options.name}-{0:08d}",  # as long as the final one, so that the size is final, too
                source=self.options.source,
                license=self.options.license,
                where=item.where,
            )
            if self.known is not None and (like := self.known.find_any(data)) and self.options.drop_overlap:
                raise SampleError(f"{item.where}: an image like {like}, which a benchmark holds", "benchmark_overlap")
            if 2 * sample.stored_size > _LARGEST:
                raise SampleError(
                    f"{item.where}: a sample of {sample.stored_size} bytes, expected less than 2 GiB", "too_large"
                )
        except DataError as error:
            return ConvertedRow(place, error=error, like=like)
        except OSError as error:
            return ConvertedRow(place, error=_unread_error(self.raw, error))
        return ConvertedRow(place, sample, like=like)


def unnamed(name: str) -> str:
    """Return what stands for the id of a sample that will be called by its key, and is as long."""
    return "\x7f" * len(f"{name}-{0:08d}")


class Spool:
    """The tars of the first pass in a working folder."""

    def __init__(self, work: WorkFolder, options: PackOptions) -> None:
        self._work = work
        self._options = options

    def read(self, job: ConvertJob, num_rows: int | None) -> Report:
        """Read what was not read before, and return the report of all rows; `num_rows` of them are expected.

        Raises:
            DataError: The raw data cannot be read, the disk is full, or with `strict` a row is invalid (SampleError).
        """
        limit = self._options.limit
        report, tar = self._last()
        if report.finished:
            return report
        total = limit if num_rows is None else min(num_rows, limit or num_rows)
        batches = _batches(job.raw, report)
        converted = run_jobs(job, batches, workers=self._options.workers)
        with closing(converted), tqdm(total=total, initial=report.read, unit="row", desc="read") as bar:
            rows = chain.from_iterable(converted)
            while not report.finished:
                self._write_tar(tar, rows, report, bar)
                tar += 1
        return report

    def _last(self) -> tuple[Report, int]:
        """Return the report of the last finished tar, and the number of the next one."""
        finished = len(list(self._work.spool.glob("*.json")))
        if not finished:
            return Report(), 0
        return Report.from_json(self._work.spool_file(finished - 1, "json").read_bytes()), finished

    def _write_tar(self, number: int, converted: Iterator[ConvertedRow], report: Report, bar: Any) -> None:
        """Write the samples of the next rows to a tar, and then what is known of them."""
        rows: list[tuple[int, ...]] = []
        images: list[int] = []
        size, last = 0, report.next_row + _ROWS_OF_A_TAR
        try:
            with (
                atomic_path(self._work.spool_file(number, "tar")) as path,
                tarfile.open(path, "w:", format=tarfile.USTAR_FORMAT) as tar,
            ):
                while len(rows) < TAR_SAMPLES and size < TAR_BYTES and report.next_row < last and not report.finished:
                    one = next(converted, None)
                    sample = self._count(one, report, bar) if one else None
                    report.finished = one is None or report.read == self._options.limit
                    if one and sample:
                        rows.append(self._row(one.place.number, sample, number, tar.offset))
                        images += sorted({int(image["sha256"][:16], 16) for image in sample.record["images"]})
                        add_members(tar, sample.members)
                        size += sample.stored_size
            write_array(self._work.spool_file(number, "rows.npy"), np.array(rows, dtype=ROW))
            write_array(self._work.spool_file(number, "images.npy"), np.array(images, dtype="<u8"))
            write_atomically(self._work.spool_file(number, "json"), report.to_json())
        except OSError as error:
            raise space_error(self._work.spool, error) from error

    def _row(self, number: int, sample: ShardSample, tar: int, offset: int) -> tuple[int, ...]:
        """Return the entry of a sample, in the order of `ROW`."""
        given = sample.record["id"]
        id_hash = 0 if given in (None, unnamed(self._options.name)) else _hash64(str(given)) or 1
        return _hash64(f"{self._options.seed}\0{number}"), id_hash, number, tar, offset, sample.stored_size

    def _count(self, one: ConvertedRow, report: Report, bar: Any) -> ShardSample | None:
        """Count a row, and return its sample if it has one; raise its error where that stops the packing."""
        if one.error is not None and (self._options.strict or not isinstance(one.error, SampleError)):
            raise one.error
        place = one.place
        report.next_row, report.part, report.part_rows = place.number + 1, place.part, place.part_rows
        if one.sample is None and one.error is None:
            return None
        report.read += 1
        bar.update()
        if one.like:
            report.add_overlap(place.number, one.like)
        if isinstance(one.error, SampleError):
            report.add_skipped(one.error, place.number)
        elif one.sample is not None:
            report.add_sample(one.sample.record["source"], len(one.sample.record["images"]))
        return one.sample


def read_spooled(work: WorkFolder, place: Any) -> tuple[dict[str, Any], list[tuple[str, bytes]]]:
    """Read a sample back by its place, an element of `ROW` or `plan.PLACE`.

    Returns:
        Its JSON, and ending after the key and content of each of its images.

    Raises:
        DataError: The tar is damaged.
    """
    path = work.spool_file(int(place["tar"]), "tar")
    try:
        with path.open("rb", buffering=0) as stream:
            stream.seek(int(place["offset"]))
            content = io.BytesIO(stream.read(int(place["size"])))
        with tarfile.open(fileobj=content, mode="r:") as tar:
            (_, text), *images = ((info.name.partition(".")[2], _content(tar, info)) for info in tar)
        record = json.loads(text)
        if [image["sha256"] for image in record["images"]] != [hashlib.sha256(data).hexdigest() for _, data in images]:
            raise ValueError("its images are not those of its record")
    except (OSError, tarfile.TarError, ValueError, LookupError) as error:
        raise DataError(
            f"{path} is damaged at byte {place['offset']} ({error}); remove the folder {work.path} and start again"
        ) from error
    return record, images


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(info)
    return stream.read() if stream else b""


def _batches(raw: RawData, report: Report) -> Iterator[list[RawRow]]:
    """Yield the rows that were not read before, a few at a time; the last one may be the error of its part."""
    rows = _unread(raw, report)
    while batch := list(islice(rows, _BATCH)):
        yield batch


def _unread(raw: RawData, report: Report) -> Iterator[RawRow]:
    number, before = report.next_row, report.part_rows
    for part, held in enumerate(raw.parts()):
        if part < report.part:
            continue
        part_rows = before if part == report.part else 0
        try:
            for row in islice(raw.rows(held), part_rows, None):
                part_rows += 1
                yield RawRow(number, part, part_rows, row)
                number += 1
        except (DataError, OSError) as error:
            # In its turn: what comes before it is written and counted, however many processes there are.
            known = isinstance(error, DataError) and not isinstance(error, SampleError)
            yield RawRow(number, part, part_rows, error if known else _unread_error(raw, error))
            return


def _unread_error(raw: RawData, error: Exception) -> DataError:
    return DataError(f"{raw.name} cannot be read ({error}); check its files and start again")


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
