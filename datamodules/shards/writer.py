"""Write samples as WebDataset shards with equal bytes for equal samples (no torch).

A shard gets its name when it is complete and its index beside it, and the manifest is written last: a killed run leaves
a folder that `load_manifest` refuses. Tars are written by the standard library, as webdataset imports torch.
"""

import errno
import logging
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from alignvlm_pl.errors import ConfigError, DataError

from .index import index_path
from .manifest import MANIFEST_NAME, Manifest, Shard, write_manifest
from .shard_file import OpenShard, ShardSample, shard_sample

logger = logging.getLogger(__name__)

MAX_SHARD_BYTES = 512 * 2**20
# Kept free so that the manifest and the padding of the tar always fit.
SPARE_BYTES = 8 * 2**20


class ShardWriter:
    """Context manager that numbers samples and packs them into `<name>-00000.tar`, `<name>-00001.tar`, ….

    An exception inside the block removes what was written. Two runs over equal samples give equal bytes. `extra` are
    further fields for the manifest, which may be filled until the block ends.
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
        """Prepare a folder, created if needed, for a new dataset; an invalid name or size is a ConfigError.

        `name` is the stem of shards and keys: letters, digits, ``_`` and ``-``, as webdataset cuts keys at the first
        dot. `source` and `license` are defaults for fields of the samples. A new shard begins after
        `samples_per_shard` samples, or `max_bytes` bytes. A finished dataset is kept unless `overwrite` is set.
        """
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ConfigError(f"name of a dataset: expected letters, digits, '_' and '-', found {name!r}")
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
        self.num_samples = 0
        self._open_shard: OpenShard | None = None

    def __enter__(self) -> "ShardWriter":
        manifest = self.folder / MANIFEST_NAME
        if manifest.exists() and not self._overwrite:
            raise DataError(f"{self.folder} already holds a finished dataset; choose another folder or overwrite it")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            manifest.unlink(missing_ok=True)
            # What a killed run left; the name of another dataset may begin with this one's.
            for leftover in self.folder.iterdir():
                if is_part_of(self.name, leftover.name):
                    leftover.unlink()
        except OSError as error:
            raise DataError(f"cannot write to {self.folder}: {error.strerror}; choose another folder") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            self._close_shard()
            if not self.num_samples:
                raise DataError(f"no sample was written to {self.folder}; an empty dataset cannot be read")
            manifest = Manifest(
                folder=self.folder,
                name=self.name,
                source=self._source,
                license=self._license,
                num_samples=self.num_samples,
                shards=tuple(self._shards),
                sources=dict(self._sources),
                extra=self.extra,
            )
            write_manifest(manifest)
        except BaseException:
            self._discard()
            raise
        logger.info("wrote %d samples in %d shards to %s", self.num_samples, len(self._shards), self.folder)

    def add(self, record: Mapping[str, Any], images: Sequence[bytes], extensions: Sequence[str]) -> str:
        """Write one sample, and return the key that it is given.

        `record` has ``messages``, `shard_sample` adds what is missing. `images` are files, stored byte by byte, and
        `extensions` those of their names. DataError: it violates the sample schema, or the disk is full.
        """
        key = f"{self.name}-{self.num_samples:08d}"
        sample = shard_sample(record, images, extensions, key=key, source=self._source, license=self._license)
        self._write(sample)
        self.num_samples += 1
        self._sources[sample.record["source"]] += 1
        return key

    def _write(self, sample: ShardSample) -> None:
        full = self._open_shard
        if full and (full.num_samples >= self._samples_per_shard or full.size + sample.size > self._max_bytes):
            self._close_shard()
        check_space(self.folder, sample.size)
        try:
            if self._open_shard is None:
                self._open_shard = OpenShard(self.folder / f"{self.name}-{len(self._shards):05d}.tar")
            self._open_shard.add(sample)
        except OSError as error:
            raise space_error(self.folder, error) from error

    def _close_shard(self) -> None:
        if self._open_shard is not None:
            try:
                self._shards.append(self._open_shard.finish())
            except OSError as error:
                raise space_error(self.folder, error) from error
            self._open_shard = None

    def _discard(self) -> None:
        """Remove what this run wrote."""
        if self._open_shard is not None:
            self._open_shard.abandon()
        for shard in self._shards:
            (self.folder / shard.path).unlink(missing_ok=True)
            index_path(self.folder / shard.path).unlink(missing_ok=True)


def is_part_of(name: str, file: str) -> bool:
    """Whether a file is a shard or an index, finished or not, of the dataset called `name`."""
    return re.fullmatch(rf"{re.escape(name)}-\d{{5,}}\.(tar|index\.(json|safetensors))(\.partial)?", file) is not None


def check_space(folder: Path, size: int) -> None:
    """Raise a DataError with the bytes needed and free where `size` bytes cannot be written."""
    free = shutil.disk_usage(folder).free
    if free < size + SPARE_BYTES:
        raise DataError(
            f"no space for shards in {folder}: {size + SPARE_BYTES} bytes needed, {free} free; "
            "free space or choose another folder"
        )


def space_error(folder: Path, error: OSError) -> DataError:
    """Return the error of shards that cannot be written."""
    what = "no space left" if error.errno == errno.ENOSPC else error.strerror or error
    return DataError(f"cannot write shards to {folder}: {what}; free space or choose another folder")
