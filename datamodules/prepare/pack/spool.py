"""First pass: each part of the raw data -> a file of samples in the order of the rows, and an index of them.

A record of the spool file is the length of its head (4 bytes), its head, and the bytes of its images, one after
another. The head is JSON: the sample's record, and for each image its name, size, checksum, length, and its path if it
stays in its own file.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from alignvlm_pl.errors import DataError
from alignvlm_pl.utils.atomic_files import atomic_path, write_atomically

from ...shards.sample import SampleError
from ...shards.shard_file import ShardSample, shard_sample
from ...shards.writer import space_error
from ..sources.source import Part, RawData, SourceSample, image_bytes
from .options import PackOptions
from .overlap import BenchmarkImages
from .report import PartReport
from .work_folder import WorkFolder, write_array

ROW = np.dtype(
    [("order", "<u8"), ("id", "<u8"), ("part", "<u4"), ("length", "<u4"), ("offset", "<u8"), ("size", "<u4")]
)
"""One sample: hash that orders it, hash of its id (0 = none); its part, length and offset in the spool file of the
part; bytes in a shard."""
_LARGEST = 2**32 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SpoolJob:
    """Spools single parts, comparing with the images of benchmarks; an object, as it is sent to other processes."""

    raw: RawData
    options: PackOptions
    known: BenchmarkImages | None = None

    def __call__(self, number: int, part: Part, cap: int | None = None) -> PartReport:
        """Spool one part, the `number`-th, of which at most `cap` rows are read.

        Raises:
            DataError: The part cannot be read, the disk is full, or with `strict` a row is invalid (SampleError).
        """
        work = WorkFolder(self.options.out)
        report = PartReport(part=part.name)
        rows: list[tuple[int, ...]] = []
        images: list[int] = []
        try:
            with atomic_path(work.part_file(number, "bin")) as partial, partial.open("wb") as out:
                for row, item in enumerate(islice(self._read(part), cap)):
                    report.read += 1
                    try:
                        if isinstance(item, SampleError):
                            raise item
                        sample, data = self._checked(item, row, report)
                        offset = out.tell()
                        _write(out, item, data, sample)
                    except SampleError as error:
                        if self.options.strict:
                            raise
                        report.add_skipped(error, row)
                        continue
                    report.add_sample(sample.record["source"], len(data))
                    order = _hash64(f"{self.options.seed}\0{part.name}\0{row}")
                    length = out.tell() - offset
                    rows.append((order, _id_hash(item.record.get("id")), number, length, offset, sample.stored_size))
                    images += sorted({int(image["sha256"][:16], 16) for image in sample.record["images"]})
            write_array(work.part_file(number, "rows.npy"), np.array(rows, dtype=ROW))
            write_array(work.part_file(number, "images.npy"), np.array(images, dtype="<u8"))
            write_atomically(work.part_file(number, "json"), report.to_json())
        except OSError as error:
            raise space_error(work.spool, error) from error
        return report

    def _read(self, part: Part) -> Iterator[SourceSample | SampleError]:
        """Read a part; an OSError of its files is a DataError, unlike one of the disk that is written to."""
        try:
            yield from self.raw.read(part)
        except OSError as error:
            raise DataError(f"{part.name} cannot be read ({error}); check the file and start again") from error

    def _checked(self, item: SourceSample, row: int, report: PartReport) -> tuple[ShardSample, list[bytes]]:
        """Validate a sample in its final form; return it with the content of its images."""
        options, where = self.options, f"{report.part}, row {row}"
        data = [image_bytes(image, where=where) for image, _ in item.images]
        # A key of the same length, so that the size is that of the sample in its shard.
        sample = shard_sample(
            item.record,
            data,
            [ending for _, ending in item.images],
            key=f"{options.name}-00000000",
            source=options.source,
            license=options.license,
            where=where,
        )
        if self.known is not None and (match := self.known.find_any(data)):
            report.add_overlap(row, match)
            if options.drop_overlap:
                raise SampleError(f"{where}: an image like {match}, which a benchmark holds", "benchmark_overlap")
        if 2 * sample.stored_size > _LARGEST:
            raise SampleError(f"{where}: a sample of {sample.stored_size} bytes, expected less than 2 GiB", "too_large")
        return sample, data


def _write(out: BinaryIO, item: SourceSample, data: Sequence[bytes], sample: ShardSample) -> None:
    """Append a sample to a spool file; images that are files stay where they are."""
    contents = [(image, held) for (image, _), held in zip(item.images, data, strict=True)]
    images = [
        {**described, "bytes": len(held), "path": str(image.absolute()) if isinstance(image, Path) else None}
        for (image, held), described in zip(contents, sample.record["images"], strict=True)
    ]
    head = json.dumps({"record": item.record, "images": images}).encode()  # paths may have no encoding
    out.writelines([len(head).to_bytes(4, "big"), head, *(held for image, held in contents if image is held)])


def read_spooled(path: Path, offset: int, length: int) -> tuple[dict[str, Any], list[bytes], list[dict[str, Any]]]:
    """Read a sample back from its record in a spool file.

    Returns:
        Its JSON, the bytes of its images, and a description of each: ``file``, ``path``, ``w``, ``h`` and ``sha256``.

    Raises:
        DataError: The spool file is damaged, or the file of an image is gone.
    """
    with path.open("rb", buffering=0) as stream:
        stream.seek(offset)
        content = stream.read(length)
    start = 4 + int.from_bytes(content[:4], "big")
    try:
        head = json.loads(content[4:start])
    except ValueError as error:
        raise DataError(f"{path} is damaged at byte {offset} ({error}); remove its folder and start again") from error
    images = []
    for image in head["images"]:
        if image["path"] is None:
            images.append(content[start : start + image["bytes"]])
            start += image["bytes"]
            continue
        try:
            images.append(Path(image["path"]).read_bytes())
        except OSError as error:
            raise DataError(
                f"{image['path']} was there when its row was read, but not now ({error.strerror}); put it back"
            ) from error
    return head["record"], images, head["images"]


def _id_hash(given: object) -> int:
    return 0 if given is None else _hash64(str(given)) or 1


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
