"""Files and folders that are either complete or absent, whenever the process or the machine stops."""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ConfigError

PARTIAL = ".partial"
"""Suffix of what is still being written, or was when its process was killed."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a path beside `path`, for a file, link or folder that replaces it at the end of the block.

    After an error it is removed, and `path` is as it was.
    """
    partial = partial_path(path)
    remove(partial)
    try:
        yield partial
        replace_path(partial, path)
    except BaseException:
        remove(partial)
        raise


def partial_path(path: Path) -> Path:
    """Return the temporary name of a path, in the same folder."""
    return path.with_name(path.name + PARTIAL)


def replace_path(partial: Path, path: Path) -> None:
    """Put a complete file, link or folder in the place of another, once all of it is on the disk.

    A folder cannot replace or be replaced in one step: for a moment there is none, and the former one is beside it.
    """
    _sync(partial)
    if not os.path.lexists(path) or not (_is_folder(path) or _is_folder(partial)):
        os.replace(partial, path)
        return
    former = partial_path(path.with_name(path.name + ".old"))
    remove(former)
    os.replace(path, former)
    os.replace(partial, path)
    remove(former)


def remove(path: Path) -> None:
    """Remove a file, link or folder, if it is there."""
    if _is_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _sync(path: Path) -> None:
    """Wait until a file, or all files of a folder, are on the disk."""
    if path.is_symlink():
        return
    for inner in path.iterdir() if path.is_dir() else ():
        _sync(inner)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Write a text, as in `printable`, to a file, complete or not at all; a ConfigError where its folder is a file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"{path.parent} cannot be made a folder: a file is in its place") from error
    with atomic_path(path) as partial:
        partial.write_text(printable(text), encoding="utf-8")


def printable(text: str) -> str:
    r"""Return a text that has an encoding: half a surrogate pair is written out, ``\ud83d``, which JSON reads back."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def write_predictions(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write prediction records as jsonl."""
    write_atomically(path, "".join(to_json(record, ensure_ascii=False) + "\n" for record in records))


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write `results.json`."""
    write_atomically(path, to_json(results, indent=2) + "\n")


def to_json(value: Any, **options: Any) -> str:
    """Return standard JSON, with options of `json.dumps`: nan and infinities are written as null."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
