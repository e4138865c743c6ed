"""The working folder of an unfinished `pack`: identity of the run, lock, spooled samples, finished shards."""

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from alignvlm_pl import __version__
from alignvlm_pl.errors import DataError
from alignvlm_pl.utils.atomic_files import PARTIAL, atomic_path, write_atomically

from ..sources.source import RawData
from .options import PackOptions

logger = logging.getLogger(__name__)
WORK_FOLDER = ".prepare"
_FORMAT = 3
_NOT_DECIDING = ("out", "workers", "overwrite")


class WorkFolder:
    """`.prepare` in the output folder; removed when the dataset is finished."""

    def __init__(self, out: Path) -> None:
        self.path = out / WORK_FOLDER
        self.spool = self.path / "spool"  # samples in the order of their rows
        self.packed = self.path / "packed"  # records of finished shards
        self._identity = self.path / "identity.json"
        self._lock = FileLock(self.path / "run.lock")

    def spool_file(self, number: int, ending: str) -> Path:
        """Return a file of the first pass: ``tar``, samples; ``rows.npy`` and ``images.npy``; ``json``, its report.

        CONTRACT: the report is written last, so a tar is finished if it exists.
        """
        return self.spool / f"{number:06d}.{ending}"

    def load_spooled(self, ending: str) -> np.ndarray:
        """Return the arrays of all tars, ``rows.npy`` or ``images.npy``, joined in their order."""
        return np.concatenate([np.load(path, allow_pickle=False) for path in sorted(self.spool.glob(f"*.{ending}"))])

    def belongs_to(self, identity: Mapping[str, Any]) -> bool:
        """Return whether the folder holds work with this identity."""
        try:
            return bool(json.loads(self._identity.read_text("utf-8")) == identity)
        except (OSError, ValueError):
            return False

    def lock(self) -> None:
        """Raise DataError where another run uses the folder; nothing is locked where there are no locks."""
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise DataError(f"another run is packing into {self.path.parent}; wait for it or end it first") from None
        except (OSError, NotImplementedError):
            pass

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
        self._lock.release()

    def remove(self) -> None:
        """Remove the folder."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)


def fetched_folder(out: Path) -> Path:
    """Return the folder of the copies of remote files, while `pack` writes to the folder `out`."""
    return out / WORK_FOLDER / "fetched"


def identity_of(raw: RawData, options: PackOptions, known: Sequence[str]) -> dict[str, Any]:
    """Describe a run by all that its result depends on: data, settings, inputs with sizes and times, version.

    The images of benchmarks are described by `known` (`folder_identity`).
    """
    return {
        "format": _FORMAT,
        "version": __version__,
        "data": f"{type(raw).__module__}.{raw!r}",
        "inputs": files_digest(raw.inputs()),
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


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an array, complete or not at all."""
    with atomic_path(path) as partial, partial.open("wb") as stream:
        np.save(stream, array, allow_pickle=False)
