"""The working folder of an unfinished `pack`: identity of the run, locks, finished parts and shards."""

import contextlib
import fcntl
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from alignvlm_pl import __version__
from alignvlm_pl.errors import DataError
from alignvlm_pl.utils.atomic_files import PARTIAL, atomic_path, write_atomically

from ..sources.source import Part, RawData
from .options import PackOptions

logger = logging.getLogger(__name__)
WORK_FOLDER = ".prepare"
_FORMAT = 2
_NOT_DECIDING = ("out", "workers", "overwrite")
_PATIENCE_S = 30.0


class WorkFolder:
    """`.prepare` in the output folder; removed when the dataset is finished."""

    def __init__(self, out: Path) -> None:
        self.path = out / WORK_FOLDER
        self.spool = self.path / "spool"  # samples of finished parts
        self.packed = self.path / "packed"  # records of finished shards
        self.workers_lock = self.path / "workers.lock"  # every process of a run keeps it locked
        self._identity = self.path / "identity.json"
        self._lock: BinaryIO | None = None

    def part_file(self, part: int, ending: str) -> Path:
        """Return a file of a part: ``bin``, its samples; ``rows.npy`` and ``images.npy``; ``json``, its report.

        CONTRACT: the report is written last, so a part is finished if it exists.
        """
        return self.spool / f"{part:06d}.{ending}"

    def load_parts(self, parts: Iterable[int], ending: str) -> np.ndarray:
        """Return the arrays of parts, joined in their order."""
        return np.concatenate([np.load(self.part_file(part, ending), allow_pickle=False) for part in parts])

    def belongs_to(self, identity: Mapping[str, Any]) -> bool:
        """Return whether the folder holds work with this identity."""
        try:
            return bool(json.loads(self._identity.read_text("utf-8")) == identity)
        except (OSError, ValueError):
            return False

    def lock(self) -> None:
        """Wait for the processes of a killed run, and raise DataError where another run uses the folder."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = lock_file(self.path / "run.lock")
        lock_file(self.workers_lock, patience_s=_PATIENCE_S).close()

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Create the subfolders and write the identity."""
        self.spool.mkdir(exist_ok=True)
        self.packed.mkdir(exist_ok=True)
        write_atomically(self._identity, json.dumps(identity, indent=1) + "\n")

    def clear(self) -> None:
        """Remove work on another dataset."""
        if self.spool.exists():
            logger.warning("%s holds work on another dataset (other data or settings); it is removed", self.path)
        self._identity.unlink(missing_ok=True)
        shutil.rmtree(self.spool, ignore_errors=True)
        shutil.rmtree(self.packed, ignore_errors=True)
        for path in self.path.iterdir():
            if path.suffix in (".npy", ".json", PARTIAL):
                path.unlink()

    def close(self) -> None:
        """Unlock the folder and keep it for the next run."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def remove(self) -> None:
        """Remove the folder."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)


def lock_file(path: Path, *, shared: bool = False, patience_s: float = 0.0) -> BinaryIO:
    """Lock a file, created if missing, until the returned one is closed; nothing is locked where there are no locks.

    Raises:
        DataError: Another process has locked it, and not just shared as this one, for `patience_s` seconds.
    """
    stream = path.open("ab")
    end = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(stream, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            if time.monotonic() > end:
                stream.close()
                raise DataError(
                    f"another run is packing into {path.parent.parent}; wait for it or end it first"
                ) from None
            time.sleep(0.05)
            continue
        except OSError:
            pass  # there are no locks here
        return stream


def identity_of(raw: RawData, parts: Sequence[Part], options: PackOptions, known: Sequence[str]) -> dict[str, Any]:
    """Describe a run by all that its result depends on: data, settings, inputs with sizes and times, version.

    The images of benchmarks are described by `known` (`folder_identity`).
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
        **{name: value for name, value in asdict(options).items() if name not in _NOT_DECIDING},
        "overlap_with": list(known),
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


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an array, complete or not at all."""
    with atomic_path(path) as partial, partial.open("wb") as stream:
        np.save(stream, array, allow_pickle=False)


def _files(value: object) -> Iterator[Path]:
    """Find the files that the fields of an object name."""
    if isinstance(value, (str, Path)):
        if 0 < len(str(value)) < 4096 and "\0" not in str(value):
            with contextlib.suppress(OSError):  # a text that is too long for a name
                if Path(value).is_file():
                    yield Path(value).absolute()
    elif is_dataclass(value):
        yield from _files([getattr(value, field.name) for field in fields(value)])
    elif isinstance(value, Mapping):
        yield from _files(list(value.values()))
    elif isinstance(value, (Sequence, Set)) and not isinstance(value, bytes):
        for inner in value:
            yield from _files(inner)
