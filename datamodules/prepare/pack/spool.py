"""First pass: each part of the raw data -> a file of samples in the order of the rows, and an index of them.

A record of the spool file is the length of its head (4 bytes), its head, and the bytes of its images, one after
another. The head is JSON: the sample's record, and for each image its ending, checksum, length, and its path if it
stays in its own file.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from alignvlm_pl.errors import DataError
from alignvlm_pl.utils.atomic_files import partial_path, replace_path

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


@dataclass(frozen=True, kw_only=True, slots=True)
class SpoolFiles:
    """The files of one part.

    Attributes:
        folder: Where they lie.
        number: Index of the part.
    """

    folder: Path
    number: int

    @property
    def samples(self) -> Path:
        """The samples."""
        return self.folder / f"{self.number:06d}.bin"

    @property
    def rows(self) -> Path:
        """Array of `ROW`."""
        return self.folder / f"{self.number:06d}.rows.npy"

    @property
    def images(self) -> Path:
        """Array of 64-bit checksums: each different image of each sample."""
        return self.folder / f"{self.number:06d}.images.npy"

    @property
    def report(self) -> Path:
        """The `PartReport`; written last, so a part is finished if it exists."""
        return self.folder / f"{self.number:06d}.json"


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
        index = _SpoolIndex()
        try:
            with _SpoolFile(files.samples) as out:
                for row, item in enumerate(islice(self._read(part), cap)):
                    report.read += 1
                    try:
                        if isinstance(item, SampleError):
                            raise item
                        self._add(item, part, row, out, index, report)
                    except SampleError as error:
                        if self.strict:
                            raise
                        report.add_skipped(error, row)
            write_array(files.rows, np.array(index.rows, dtype=ROW))
            write_array(files.images, np.array(index.images, dtype="<u8"))
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
        self,
        item: SourceSample,
        part: Part,
        row: int,
        out: "_SpoolFile",
        index: "_SpoolIndex",
        report: PartReport,
    ) -> None:
        """Validate a sample in its final form and append it to the spool file."""
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
        offset = out.size
        length = out.add(_head(item, data, sample), data, item)
        place = _hash64(f"{self.seed}\0{part.name}\0{row}")
        index.rows.append((place, _id_hash(item.record), offset, length, size))
        digests = {image["sha256"] for image in sample.record["images"]}
        index.images.extend(sorted(int(digest[:16], 16) for digest in digests))
        report.add_sample(sample.record["source"], len(data))


@dataclass(kw_only=True, slots=True)
class _SpoolIndex:
    """The index of the part as it grows."""

    rows: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    images: list[int] = field(default_factory=list)


class _SpoolFile:
    """Appends records; the file is renamed to its name when complete."""

    def __init__(self, path: Path) -> None:
        self.size = 0
        self._path = path
        self._partial = partial_path(path)
        self._stream = self._partial.open("wb")

    def __enter__(self) -> "_SpoolFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        if kind is None:
            replace_path(self._partial, self._path)
        else:
            self._partial.unlink(missing_ok=True)

    def add(self, head: bytes, data: Sequence[bytes], item: SourceSample) -> int:
        """Append a record and return its length in bytes."""
        pieces = [len(head).to_bytes(4, "big"), head]
        pieces += [held for held, (image, _) in zip(data, item.images, strict=True) if image is held]
        self._stream.writelines(pieces)
        length = sum(len(piece) for piece in pieces)
        self.size += length
        return length


def read_record(stream: BinaryIO, offset: int, length: int) -> tuple[dict[str, Any], list[bytes], list[dict[str, Any]]]:
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
    return json.dumps({"record": item.record, "images": images}, ensure_ascii=False).encode()


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
