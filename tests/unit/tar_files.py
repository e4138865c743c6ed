"""Tars with given members."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], *, kind: int = tarfile.DEFAULT_FORMAT) -> Path:
    """Write a tar of members (name, content) in one of `tarfile`'s formats; a name may be there twice."""
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
