"""First pass: each part of the raw data -> a file of samples in the order of the rows, and an index of them.

A record of the spool file is the length of its head (4 bytes), its head, and the bytes of its images, one after
another. The head is JSON: the sample's record, and for each image its ending, checksum, length, and its path if it
stays in its own file.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from alignvlm_pl.errors import DataError
from alignvlm_pl.utils.atomic_files import atomic_path

from ...shards.sample import SampleError
from ...shards.shard_file import ShardSample, shard_sample
from ...shards.writer import space_error
from ..sources.source import Part, RawData, SourceSample, image_bytes
from .overlap import BenchmarkImages
from .report import PartReport
from .work_folder import write_array, write_whole

ROW = np.dtype([("order", "<u8"), ("id", "<u8"), ("offset", "<u8"), ("length", "<u4"), ("size", "<u4")], align=False)
"""One sample: hash that orders it, hash of its id (0 = none), offset and length in the spool file, bytes in a shard."""
_LARGEST = 2**32 - 1


class SpoolFiles:
    """Paths of the files of one part in the spool folder.

    Attributes:
        samples: The samples.
        rows: Array of `ROW`.
        images: Array of 64-bit checksums: each different image of each sample.
        report: The `PartReport`; written last, so a part is finished if it exists.
    """

    def __init__(self, *, folder: Path, number: int) -> None:
        self.number = number
        stem = f"{number:06d}"
        self.samples = folder / f"{stem}.bin"
        self.rows = folder / f"{stem}.rows.npy"
        self.images = folder / f"{stem}.images.npy"
        self.report = folder / f"{stem}.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class SpoolJob:
    """Spool single parts; an object, because it is sent to other processes.

    Attributes:
        raw: The data.
        folder: Where the spool files go.
        name: Name of the dataset.
        source: ``source`` of samples that name none.
        license: ``license`` of samples that name none.
        seed: Seed of the shuffle.
        strict: Raise the first invalid row.
        known: Images of benchmarks to compare with; None for none.
        drop_overlap: Skip samples with such an image.
    """

    raw: RawData
    folder: Path
    name: str
    source: str
    license: str
    seed: int
    strict: bool = False
    known: BenchmarkImages | None = None
    drop_overlap: bool = False

    def __call__(self, number: int, part: Part, cap: int | None = None) -> PartReport:
        """Spool one part, the `number`-th, of which at most `cap` rows are read.

        Raises:
            SampleError: An invalid row, with `strict`.
            DataError: The part cannot be read, or the disk is full.
        """
        files = SpoolFiles(folder=self.folder, number=number)
        report = PartReport(part=part.name, cap=cap)
        rows: list[tuple[int, int, int, int, int]] = []
        images: list[int] = []
        try:
            with atomic_path(files.samples) as partial, partial.open("wb") as out:
                for row, item in enumerate(islice(self._read(part), cap)):
                    report.read += 1
                    try:
                        if isinstance(item, SampleError):
                            raise item
                        place, checksums = self._add(item, part, row, out, report)
                        rows.append(place)
                        images.extend(checksums)
                    except SampleError as error:
                        if self.strict:
                            raise
                        report.add_skipped(error, row)
            write_array(files.rows, np.array(rows, dtype=ROW))
            write_array(files.images, np.array(images, dtype="<u8"))
            write_whole(files.report, report.to_json())
        except OSError as error:
            raise space_error(self.folder, error) from error
        return report

    def _read(self, part: Part) -> Iterator[SourceSample | SampleError]:
        """Read a part; an OSError of its files is a DataError, unlike one of the disk that is written to."""
        try:
            yield from self.raw.read(part)
        except OSError as error:
            raise DataError(f"{part.name} cannot be read ({error}); check the file and start again") from error

    def _add(
        self, item: SourceSample, part: Part, row: int, out: BinaryIO, report: PartReport
    ) -> tuple[tuple[int, int, int, int, int], list[int]]:
        """Validate a sample in its final form and append it to the file; return its `ROW` and its images' checksums."""
        where = f"{part.name}, row {row}"
        data = [image_bytes(image, where=where) for image, _ in item.images]
        # A key of the same length, so that the size is that of the sample in its shard.
        sample = shard_sample(
            item.record,
            data,
            [ending for _, ending in item.images],
            key=f"{self.name}-00000000",
            source=self.source,
            license=self.license,
            where=where,
        )
        if self.known is not None and (match := self.known.find_any(data)):
            report.add_overlap(row, match)
            if self.drop_overlap:
                raise SampleError(f"{where}: an image like {match}, which a benchmark holds", "benchmark_overlap")
        size = sample.stored_size
        if 2 * size > _LARGEST:
            raise SampleError(f"{where}: a sample of {size} bytes, expected less than 2 GiB", "too_large")
        offset = out.tell()
        head = _head(item, data, sample)
        # Images that are files stay where they are.
        held = [content for content, (image, _) in zip(data, item.images, strict=True) if image is content]
        out.writelines([len(head).to_bytes(4, "big"), head, *held])
        report.add_sample(sample.record["source"], len(data))
        order = _hash64(f"{self.seed}\0{part.name}\0{row}")
        checksums = sorted({int(image["sha256"][:16], 16) for image in sample.record["images"]})
        return (order, _id_hash(item.record), offset, out.tell() - offset, size), checksums


def read_spooled(
    stream: BinaryIO, offset: int, length: int
) -> tuple[dict[str, Any], list[bytes], list[dict[str, Any]]]:
    """Read a sample back.

    Args:
        stream: A spool file.
        offset: Where its record begins.
        length: Bytes of its record.

    Returns:
        Its JSON, the bytes of its images, and a description of each: ``extension``, ``path``, ``w``, ``h`` and
        ``sha256``.

    Raises:
        DataError: The spool file is damaged, or the file of an image is gone.
    """
    stream.seek(offset)
    content = stream.read(length)
    start = 4 + int.from_bytes(content[:4], "big")
    try:
        head = json.loads(content[4:start])
    except ValueError as error:
        raise DataError(
            f"{stream.name} is damaged at byte {offset} ({error}); remove its folder and start again"
        ) from error
    images = []
    for image in head["images"]:
        if image["path"] is None:
            images.append(content[start : start + image["bytes"]])
            start += image["bytes"]
        else:
            images.append(_read_again(Path(image["path"])))
    return head["record"], images, head["images"]


def _head(item: SourceSample, data: Sequence[bytes], sample: ShardSample) -> bytes:
    images = [
        {
            "extension": ending,
            "bytes": len(held),
            "path": None if isinstance(image, bytes) else str(image.absolute()),
            **{name: described[name] for name in ("w", "h", "sha256")},
        }
        for (image, ending), held, described in zip(item.images, data, sample.record["images"], strict=True)
    ]
    return json.dumps({"record": item.record, "images": images}).encode()  # paths may have no encoding


def _read_again(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} was there when its row was read, but not now ({error.strerror}); put it back"
        ) from error


def _id_hash(record: Mapping[str, Any]) -> int:
    return 0 if record.get("id") is None else _hash64(str(record["id"])) or 1


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
