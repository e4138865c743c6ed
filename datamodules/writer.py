"""Write samples as WebDataset shards: deterministic bytes, never half a set that looks whole (no torch).

Tars are written with the standard library because importing webdataset imports torch, which the `prepare`
commands do without. A shard gets its name when it is complete, and the manifest is the last file written:
a run that is killed leaves a folder that `load_manifest` refuses.
"""

import errno
import hashlib
import io
import json
import logging
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from PIL import Image

from alignvlm_pl.errors import ConfigError, DataError

from .manifest import MANIFEST_NAME, Manifest, Shard, write_manifest
from .sample import check_record

logger = logging.getLogger(__name__)

MAX_SHARD_BYTES = 512 * 2**20
# Kept free so that the manifest and the padding of the tar always fit.
SPARE_BYTES = 8 * 2**20
EXTENSIONS = ("png", "jpg", "jpeg", "webp")
_EXIF_ORIENTATION = 0x0112


class ShardWriter:
    """Context manager that numbers samples and packs them into `<name>-00000.tar`, `<name>-00001.tar`, ….

    An exception inside the block removes what was written. Two runs over equal samples give equal bytes.

    Attributes:
        extra: Further fields for the manifest; may be filled until the block ends.
    """

    def __init__(
        self,
        out_dir: Path | str,
        *,
        name: str,
        source: str,
        license: str,
        samples_per_shard: int = 512,
        max_bytes: int = MAX_SHARD_BYTES,
        overwrite: bool = False,
    ) -> None:
        """Prepare a folder for a new set.

        Args:
            out_dir: Folder for the shards; created if needed.
            name: Name of the set, the stem of shards and keys: letters, digits, ``_`` and ``-`` only
                (WebDataset cuts keys at the first dot).
            source: Default for the ``source`` field of the samples.
            license: Default for the ``license`` field of the samples.
            samples_per_shard: Samples after which a new shard begins.
            max_bytes: Size in bytes after which a new shard begins.
            overwrite: Replace a finished set that is already there.

        Raises:
            ConfigError: A bad name or size.
            DataError: The folder holds a finished set.
        """
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ConfigError(f"name of a set: expected letters, digits, '_' and '-', found {name!r}")
        if samples_per_shard < 1 or max_bytes < 1:
            raise ConfigError(
                f"samples_per_shard and max_bytes must be positive, found {samples_per_shard} and {max_bytes}"
            )
        self.folder = Path(out_dir)
        self.name = name
        self.extra: dict[str, Any] = {}
        self._source = source
        self._license = license
        self._samples_per_shard = samples_per_shard
        self._max_bytes = max_bytes
        self._overwrite = overwrite
        self._shards: list[Shard] = []
        self._sources: Counter[str] = Counter()
        self._num_samples = 0
        self._open_shard: _OpenShard | None = None

    def __enter__(self) -> "ShardWriter":
        manifest = self.folder / MANIFEST_NAME
        if manifest.exists() and not self._overwrite:
            raise DataError(
                f"{self.folder} already holds a finished set; choose another folder or allow overwriting"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            manifest.unlink(missing_ok=True)
            # What a killed run left; the name of another set may begin with ours, so match exactly.
            for leftover in self.folder.iterdir():
                if re.fullmatch(rf"{self.name}-\d{{5}}\.tar(\.tmp)?", leftover.name):
                    leftover.unlink()
        except OSError as error:
            raise DataError(
                f"cannot write to {self.folder}: {error.strerror}; choose another folder"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            self._close_shard()
            if not self._num_samples:
                raise DataError(f"no sample was written to {self.folder}; an empty set cannot be read")
            write_manifest(self._manifest())
        except BaseException:
            self._discard()
            raise
        logger.info("wrote %d samples in %d shards to %s", self._num_samples, len(self._shards), self.folder)

    @property
    def num_samples(self) -> int:
        """Samples added so far."""
        return self._num_samples

    def add(self, record: Mapping[str, Any], images: Sequence[bytes], extensions: Sequence[str]) -> str:
        """Write one sample.

        Args:
            record: JSON of the sample; ``messages`` is required. ``id``, ``source``, ``license``, ``task``
                and ``images`` (names, sizes, checksums) are filled in where missing.
            images: Encoded image files, stored byte by byte.
            extensions: File name extension of each image, without dot.

        Returns:
            The key given to the sample.

        Raises:
            DataError: The sample breaks the normal form, or the disk is full.
        """
        key = f"{self.name}-{self._num_samples:08d}"
        if len(images) != len(extensions):
            raise DataError(f"sample {key}: {len(images)} images but {len(extensions)} extensions")
        check_record(record, num_images=len(images), where=f"sample {key}")
        files = [f"{index}.{_extension(extension, key)}" for index, extension in enumerate(extensions)]
        full = self._complete(record, key, images, files)
        members = [(f"{key}.json", json.dumps(full, ensure_ascii=False, sort_keys=True).encode())]
        members += [(f"{key}.{file}", image) for file, image in zip(files, images, strict=True)]
        self._write(members)
        self._num_samples += 1
        self._sources[full["source"]] += 1
        return key

    def _complete(
        self, record: Mapping[str, Any], key: str, images: Sequence[bytes], files: Sequence[str]
    ) -> dict[str, Any]:
        defaults = {"id": key, "source": self._source, "task": "vqa", "license": self._license}
        described = [_describe(image, file, key) for image, file in zip(images, files, strict=True)]
        return {**defaults, **record, "images": described}

    def _write(self, members: Sequence[tuple[str, bytes]]) -> None:
        size = sum(len(data) for _, data in members)
        full = self._open_shard
        if full and (full.num_samples >= self._samples_per_shard or full.size + size > self._max_bytes):
            self._close_shard()
        free = shutil.disk_usage(self.folder).free
        if free < size + SPARE_BYTES:
            raise DataError(
                f"no space for shards in {self.folder}: {size + SPARE_BYTES} bytes needed, {free} free; "
                "free space or choose another folder"
            )
        try:
            if self._open_shard is None:
                self._open_shard = _OpenShard(self.folder / f"{self.name}-{len(self._shards):05d}.tar")
            self._open_shard.add(members)
        except OSError as error:
            raise _space_error(self.folder, error) from error

    def _close_shard(self) -> None:
        if self._open_shard is None:
            return
        try:
            self._shards.append(self._open_shard.finish())
        except OSError as error:
            raise _space_error(self.folder, error) from error
        self._open_shard = None

    def _discard(self) -> None:
        """Remove what this run wrote: an error must not leave shards that look like a set."""
        if self._open_shard is not None:
            self._open_shard.abandon()
        for shard in self._shards:
            (self.folder / shard.path).unlink(missing_ok=True)

    def _manifest(self) -> Manifest:
        return Manifest(
            folder=self.folder,
            name=self.name,
            source=self._source,
            license=self._license,
            num_samples=self._num_samples,
            shards=tuple(self._shards),
            sources=dict(self._sources),
            extra=self.extra,
        )


class _OpenShard:
    """A shard under its temporary name, until `finish` renames it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_samples = 0
        self.size = 0
        self._partial = path.with_name(path.name + ".tmp")
        self._file = _HashingFile(self._partial.open("wb"))
        stream: Any = self._file  # tarfile asks for a whole file object but only writes
        self._tar = tarfile.open(fileobj=stream, mode="w|", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def add(self, members: Sequence[tuple[str, bytes]]) -> None:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mode = 0o644
            # mtime, uid and gid stay 0 and the names empty, so that two runs give the same bytes.
            self._tar.addfile(info, io.BytesIO(data))
            self.size += len(data)
        self.num_samples += 1

    def finish(self) -> Shard:
        self._tar.close()
        self._file.sync_and_close()
        self._partial.replace(self.path)
        return Shard(
            path=self.path.name,
            num_samples=self.num_samples,
            bytes=self._file.num_bytes,
            sha256=self._file.digest.hexdigest(),
        )

    def abandon(self) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)


class _HashingFile:
    """Write-only file that keeps the checksum and length of what passes through."""

    def __init__(self, stream: BinaryIO) -> None:
        self.digest = hashlib.sha256()
        self.num_bytes = 0
        self._stream = stream

    def write(self, data: bytes) -> int:
        if self._stream.closed:  # tarfile flushes an abandoned archive once more when it is collected
            return len(data)
        self.digest.update(data)
        self.num_bytes += len(data)
        return self._stream.write(data)

    def sync_and_close(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()

    def close(self) -> None:
        self._stream.close()


def _extension(extension: str, key: str) -> str:
    lower = extension.lower().lstrip(".")
    if lower not in EXTENSIONS:
        raise DataError(
            f"sample {key}: image extension {extension!r}, expected one of {', '.join(EXTENSIONS)}"
        )
    return lower


def _describe(image: bytes, file: str, key: str) -> dict[str, Any]:
    """Name, upright size and checksum of an image; reads the header only."""
    try:
        with Image.open(io.BytesIO(image)) as opened:
            width, height = opened.size
            if opened.getexif().get(_EXIF_ORIENTATION, 1) >= 5:
                width, height = height, width
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            f"sample {key}: image {file} does not decode ({error}); it was not written"
        ) from error
    return {"file": file, "w": width, "h": height, "sha256": hashlib.sha256(image).hexdigest()}


def _space_error(folder: Path, error: OSError) -> DataError:
    what = "no space left" if error.errno == errno.ENOSPC else error.strerror
    return DataError(f"cannot write shards to {folder}: {what}; free space or choose another folder")
