"""One shard file with its index, whole or absent; equal samples give equal bytes (no torch here)."""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignvlm_pl.errors import DataError
from alignvlm_pl.preprocessing.imaging import read_header
from alignvlm_pl.utils.atomic_files import partial_path, replace_path

from ..storage.fetching import file_digest
from .index import IndexRow, index_path, index_row, write_index
from .manifest import Shard
from .sample import SampleError, check_record

EXTENSIONS = ("png", "jpg", "jpeg", "webp")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSample:
    """A sample as a shard stores it: its key, complete JSON, and (name, content) of its files in order."""

    key: str
    record: dict[str, Any]
    members: list[tuple[str, bytes]]

    @property
    def size(self) -> int:
        """Bytes of its files, without headers and padding."""
        return sum(len(data) for _, data in self.members)

    @property
    def stored_size(self) -> int:
        """Bytes of the sample in a shard."""
        block = tarfile.BLOCKSIZE
        return sum(block + -(-len(data) // block) * block for _, data in self.members)


def shard_sample(
    record: Mapping[str, Any],
    images: Sequence[bytes],
    extensions: Sequence[str],
    *,
    key: str,
    source: str,
    license: str,
    where: str = "",
) -> ShardSample:
    """Check a sample and complete its JSON: names, upright sizes and checksums of its images, and the defaults.

    `images` are encoded files, `extensions` those of their names. `key` names the sample in the shard, `where` in
    errors: what violates the sample schema is a SampleError. `source` and `license` are used where the record has
    none.
    """
    where = where or f"sample {key}"
    if len(images) != len(extensions):
        raise SampleError(f"{where}: {len(images)} images but {len(extensions)} extensions")
    check_record(record, num_images=len(images), where=where)
    files = [f"{index}.{extension.lower().lstrip('.')}" for index, extension in enumerate(extensions)]
    for file, extension in zip(files, extensions, strict=True):
        if file.partition(".")[2] not in EXTENSIONS:
            expected = f"expected one of {', '.join(EXTENSIONS)}"
            raise SampleError(f"{where}: image extension {extension!r}, {expected}", "image_format")
    defaults = {"id": key, "source": source, "task": "vqa", "license": license}
    sizes = [upright_size(image, name=f"{where}: image {file}") for image, file in zip(images, files, strict=True)]
    described = [
        {"file": file, "w": width, "h": height, "sha256": hashlib.sha256(image).hexdigest()}
        for file, (width, height), image in zip(files, sizes, images, strict=True)
    ]
    full = {**defaults, **record, "images": described}
    try:
        text = record_bytes(full)
    except (TypeError, ValueError) as error:  # a value that JSON does not know, NaN, half of a surrogate pair
        raise SampleError(f"{where}: its record cannot be stored as JSON ({error})", "bad_json") from error
    members = [(f"{key}.json", text)]
    members += [(f"{key}.{file}", image) for file, image in zip(files, images, strict=True)]
    return ShardSample(key=key, record=full, members=members)


def record_bytes(record: Mapping[str, Any]) -> bytes:
    """Return the JSON of a sample as a shard stores it; TypeError or ValueError: it has a value that JSON has not."""
    return json.dumps(record, ensure_ascii=False, sort_keys=True, allow_nan=False).encode()


def add_members(tar: tarfile.TarFile, members: Iterable[tuple[str, bytes]]) -> None:
    """Append files, by name and content, to a tar."""
    for name, data in members:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        info.mode = 0o644
        # mtime, uid and gid stay 0 and the names empty, so that two runs give the same bytes.
        tar.addfile(info, io.BytesIO(data))


class OpenShard:
    """A shard under its temporary name, until `finish` renames it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._rows: list[IndexRow] = []
        self._partial = partial_path(path)
        self._file = self._partial.open("wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    @property
    def num_samples(self) -> int:
        """Samples in it so far."""
        return len(self._rows)

    def add(self, sample: ShardSample) -> None:
        """Append the files of a sample."""
        sizes = [(image["w"], image["h"]) for image in sample.record["images"]]
        self._rows.append(index_row(sample.record, offset=self._tar.offset, key=sample.key, sizes=sizes, source=""))
        add_members(self._tar, sample.members)
        self.size += sample.size

    def finish(self) -> Shard:
        """Complete the shard and write its index, then give the shard its name."""
        end = self._tar.offset
        self._tar.close()
        self._file.close()
        # The index first: a shard under its own name always has one.
        shard = Shard(
            path=self.path.name,
            num_samples=self.num_samples,
            bytes=self._partial.stat().st_size,
            sha256=file_digest(self._partial),
            index_sha256=write_index(index_path(self.path), self._rows, end=end),
        )
        replace_path(self._partial, self.path)
        return shard

    def abandon(self) -> None:
        """Remove what was written."""
        self._file.close()
        self._partial.unlink(missing_ok=True)
        if not self.path.exists():
            index_path(self.path).unlink(missing_ok=True)


def upright_size(image: bytes, *, name: str) -> tuple[int, int]:
    """Return width and height in pixels of an image as it is seen, by its header; SampleError: it is none."""
    try:
        return read_header(image, name=name)[1]
    except DataError as error:
        raise SampleError(str(error), "undecodable_image") from error
