"""The working folder of an unfinished `pack`: identity of the run, finished parts and shards."""

import contextlib
import hashlib
import io
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from alignvlm_pl import __version__
from alignvlm_pl.utils.atomic_files import PARTIAL, atomic_path

from ..sources.source import Part, RawData
from .locks import acquire, wait_for_workers
from .options import PackOptions

logger = logging.getLogger(__name__)
WORK_FOLDER = ".prepare"
_FORMAT = 1
_IDENTITY = "identity.json"
# Options that determine the bytes of the dataset.
_DECIDING = ("seed", "samples_per_shard", "shard_bytes", "limit", "strict", "drop_overlap")


class WorkFolder:
    """`.prepare` in the output folder; removed when the dataset is finished.

    Attributes:
        path: The folder.
        spool: Folder of the samples of finished parts.
        packed: Folder of the records of finished shards.
    """

    def __init__(self, out: Path) -> None:
        self.path = out / WORK_FOLDER
        self.spool = self.path / "spool"
        self.packed = self.path / "packed"
        self._lock: BinaryIO | None = None

    @property
    def workers_lock(self) -> Path:
        """File that every process of a run keeps locked."""
        return self.path / "workers.lock"

    def belongs_to(self, identity: Mapping[str, Any]) -> bool:
        """Return whether the folder holds work with this identity."""
        try:
            found = json.loads((self.path / _IDENTITY).read_text("utf-8"))
        except (OSError, ValueError):
            return False
        return bool(found == json.loads(json.dumps(identity)))

    def lock(self) -> None:
        """Keep other runs out of the folder.

        Raises:
            DataError: Another run uses it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = acquire(self.path / "run.lock")
        wait_for_workers(self.workers_lock)

    def clear(self) -> None:
        """Remove work on another dataset."""
        if self.spool.exists():
            logger.warning("%s holds work on another dataset (other data or settings); it is removed", self.path)
        (self.path / _IDENTITY).unlink(missing_ok=True)
        shutil.rmtree(self.spool, ignore_errors=True)
        shutil.rmtree(self.packed, ignore_errors=True)
        for path in self.path.iterdir():
            if path.suffix in (".npy", ".json", PARTIAL):
                path.unlink()

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Create the subfolders and write the identity."""
        self.spool.mkdir(exist_ok=True)
        self.packed.mkdir(exist_ok=True)
        write_whole(self.path / _IDENTITY, (json.dumps(identity, indent=1) + "\n").encode())

    def close(self) -> None:
        """Unlock the folder and keep it for the next run."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def remove(self) -> None:
        """Remove the folder."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)

    def size(self) -> int:
        """Bytes of the samples that lie in it."""
        return sum(path.stat().st_size for path in self.spool.glob("*")) if self.spool.exists() else 0


def identity_of(raw: RawData, parts: Sequence[Part], options: PackOptions, known: Sequence[object]) -> dict[str, Any]:
    """Describe a run by all that its result depends on: data, settings, inputs with sizes and times, version.

    Args:
        raw: The data.
        parts: Its parts.
        options: The settings.
        known: Descriptions of the images of benchmarks (`folder_identity`).
    """
    listing = hashlib.sha256()
    for part in parts:
        listing.update(f"{part.name}\0{part.payload!r}\n".encode("utf-8", "surrogateescape"))
    return {
        "format": _FORMAT,
        "version": __version__,
        "data": f"{type(raw).__module__}.{raw!r}",
        "parts": listing.hexdigest(),
        "inputs": files_digest(input_files(raw, parts)),
        "name": options.dataset_name,
        "source": options.source or raw.source,
        "license": options.license or raw.license,
        **{name: getattr(options, name) for name in _DECIDING},
        "overlap_with": [str(item) for item in known],
    }


def files_digest(paths: Iterable[Path]) -> str:
    """Return a checksum that changes if a file is added, removed or changed, by names, sizes and times."""
    digest = hashlib.sha256()
    for path in paths:
        with contextlib.suppress(OSError):  # there is no such file
            status = path.stat()
            digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def input_files(raw: RawData, parts: Sequence[Part]) -> list[Path]:
    """Return the files that the fields of the data and of its parts name."""
    return sorted({*_files(raw), *(file for part in parts for file in _files(part.payload))})


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write a file, complete or not at all."""
    with atomic_path(path) as partial:
        partial.write_bytes(data)


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an array so that it is on the disk as a whole or not there."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_whole(path, buffer.getbuffer())


def _files(value: object) -> Iterator[Path]:
    """Find the files that the fields of an object name."""
    if isinstance(value, (str, Path)):
        if 0 < len(str(value)) < 4096 and "\0" not in str(value):
            try:
                named = Path(value).is_file()
            except OSError:  # a text that is too long for a name
                named = False
            if named:
                yield Path(value).absolute()
    elif is_dataclass(value):
        for field in fields(value):
            yield from _files(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _files(inner)
    elif isinstance(value, (Sequence, Set)) and not isinstance(value, bytes):
        for inner in value:
            yield from _files(inner)
