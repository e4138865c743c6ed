"""Files of a data set: on this disk, or of a hub or another store that fsspec opens, listed without a download.

Hub layout: `<config>/<split>-00000-of-00012.parquet`, or `data/<split>-….parquet` where a set has one config.
"""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from alignvlm_pl.errors import ConfigError, DataError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
_SPLIT_NAME = re.compile(rf"({'|'.join(sorted(_SPLITS, key=len, reverse=True))})(?![A-Za-z])")
# The columns of a row group are read by turns, so fsspec's one window would be fetched again and again.
_FAR: dict[str, Any] = {
    "cache_type": "blockcache",
    "block_size": 2 << 20,
    "cache_options": {"maxblocks": 16},
}


# What is read from its beginning to its end: few requests, each with what comes next.
_FORWARD: dict[str, Any] = {"cache_type": "readahead", "block_size": 16 << 20}


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """One file.

    Attributes:
        url: Its address for fsspec.
        path: What errors call it: the path, or the address where it is not on this disk.
        size: Bytes.
    """

    url: str
    path: str
    size: int

    @property
    def name(self) -> str:
        """Return the last part of its path."""
        return PurePosixPath(self.path).name

    @property
    def local(self) -> bool:
        """Whether it lies on this disk."""
        return self.url.startswith("file://")

    @property
    def split(self) -> str | None:
        """Return ``train``, ``val`` or ``test``, as its name or else its folder says; None where neither does."""
        path = PurePosixPath(self.path)
        if match := _SPLIT_NAME.match(path.name):
            return _SPLITS[match[1]]
        return _SPLITS.get(path.parent.name)

    def open(self, *, forward: bool = False) -> IO[bytes]:
        """Open it for reading.

        Args:
            forward: It will be read in its order, so that what comes next is worth fetching along.

        Raises:
            DataError: It cannot be opened.
        """
        try:
            if self.local:
                return Path(self.path).open("rb")
            filesystem, path = _fsspec().core.url_to_fs(self.url)
            stream: IO[bytes] = filesystem.open(path, "rb", **(_FORWARD if forward else _FAR))
        except Exception as error:  # each store has its own errors, and few of them are OSErrors
            raise DataError(f"{self.path} cannot be opened: {_words(error)}") from error
        return stream


def local_file(path: Path) -> StoredFile:
    """Return a file of this disk.

    Raises:
        DataError: There is none.
    """
    if not path.is_file():
        raise DataError(f"there is no {path}")
    return StoredFile(url=f"file://{path.absolute()}", path=str(path), size=path.stat().st_size)


def find_file(place: str) -> StoredFile:
    """Return the file at a path or an address.

    Raises:
        DataError: There is none, or the store does not answer.
    """
    if "://" not in place:
        return local_file(Path(place))
    found = list_folder(place)
    if len(found) != 1 or found[0].name != place.rpartition("/")[2]:
        raise DataError(f"{place} is no file")
    return found[0]


def list_files(location: str, ending: str) -> list[StoredFile]:
    """List the files with an ending at a path (file, folder, pattern), an address, or in a set of the hub.

    Args:
        location: For example ``data/bigdocs``, ``data/*.parquet``, ``memory://set`` or ``ServiceNow/BigDocs-7.5M``.
        ending: For example ``.parquet``.

    Returns:
        The files, sorted by path.

    Raises:
        DataError: There are none, or the store does not answer.
    """
    everything = _listed(location, _found)
    if files := [file for file in everything if file.path.endswith(ending)]:
        return files
    where = _address(location)[0].removeprefix("file://")
    raise DataError(f"{location}: no {ending} file there (looked at {where}, {len(everything)} other files)")


def list_folder(location: str) -> list[StoredFile]:
    """List the files that lie right in a folder, at an address or in a set of the hub; a file is itself alone.

    Raises:
        DataError: There is no such place, or the store does not answer.
    """
    return _listed(location, _right_in)


def choose_files(
    files: Sequence[StoredFile], *, config: str | None, split: str | None, where: str
) -> list[StoredFile]:
    """Keep the files of a config and a split; what the paths do not tell is not filtered by.

    Args:
        files: As listed.
        config: Name of a folder that they lie in; where all lie in one folder, its name does not matter.
        split: ``train``, ``val`` or ``test``, or a name that means one of them.
        where: How errors name the place.

    Raises:
        ConfigError: Files of several configs are there and none is chosen.
        DataError: No file is of that config or split.
    """
    folders = sorted({str(PurePosixPath(file.path).parent) for file in files})
    configs = _configs(files)
    if config is not None and len(configs) > 1:
        files = [file for file in files if config in PurePosixPath(file.path).parts]
        if not files:
            raise DataError(f"{where}: no files of config {config!r}; found: {', '.join(configs)}")
    elif len(configs) > 1:
        raise ConfigError(f"{where} holds several configs, name one with --config: {', '.join(configs)}")
    wanted = _SPLITS.get(split or "", split)
    if split is not None and any(file.split for file in files):
        kept = [file for file in files if file.split == wanted]
        if not kept:
            splits = sorted({file.split or "unnamed" for file in files})
            raise DataError(
                f"{where}: no files of split {split!r} in {', '.join(folders)[:200]}; found: {', '.join(splits)}"
            )
        return kept
    return list(files)


def short_names(files: Sequence[StoredFile]) -> list[str]:
    """Return names of files, with their folder where several files have one name."""
    names = [file.name for file in files]
    if len(set(names)) == len(names):
        return names
    return [file.path for file in files]


def canonical_split(name: str) -> str:
    """Return ``train``, ``val`` or ``test`` for any of their names; another name as it is."""
    return _SPLITS.get(name, name)


def _configs(files: Collection[StoredFile]) -> list[str]:
    """Names of the folders that files lie in, folders of splits and what all have in common apart."""
    folders = [
        [part for part in PurePosixPath(file.path).parts[:-1] if part not in _SPLITS] for file in files
    ]
    shared = 0
    while all(len(parts) > shared and parts[shared] == folders[0][shared] for parts in folders):
        shared += 1
    return sorted({parts[shared] if len(parts) > shared else "." for parts in folders})


def _address(location: str) -> tuple[str, bool]:
    """Return fsspec's address of a location, and whether it is a set of the hub."""
    if "://" in location:
        return location, location.startswith("hf://")
    if not Path(location).exists() and _HUB_ID.fullmatch(location) and not Path(location).parent.is_dir():
        return f"hf://datasets/{location}", True
    return f"file://{Path(location).absolute()}", False


def _listed(location: str, look: Callable[[Any, str], dict[str, Any]]) -> list[StoredFile]:
    """Return the files that `look` finds in a store, sorted by path."""
    url, hub = _address(location)
    try:
        filesystem, root = _fsspec().core.url_to_fs(url)
        found = look(filesystem, root)
        there = bool(found) or filesystem.exists(root)
    except ConfigError:
        raise
    except Exception as error:  # as in StoredFile.open
        raise DataError(_unreachable(location, url, hub, error)) from error
    if not there:
        raise DataError(f"{location}: there is no such file or folder, or nothing fits the pattern")
    return [
        StoredFile(url=full, path=full.removeprefix("file://"), size=int(info["size"] or 0))
        for path, info in sorted(found.items())
        for full in [filesystem.unstrip_protocol(path)]
    ]


def _right_in(filesystem: Any, root: str) -> dict[str, Any]:
    """Path -> what the store says of it, for the files right in a folder, or for a file alone."""
    if filesystem.isfile(root):
        return {root: filesystem.info(root)}
    if not filesystem.exists(root):
        return {}
    return {info["name"]: info for info in filesystem.ls(root, detail=True) if info["type"] == "file"}


def _found(filesystem: Any, root: str) -> dict[str, Any]:
    """Path -> what the store says of it, for all files at or below a path or pattern."""
    if filesystem.isfile(root):
        return {root: filesystem.info(root)}
    if any(mark in root for mark in "*?[") and not filesystem.exists(root):
        found = filesystem.glob(root, detail=True)
        return {path: info for path, info in found.items() if info["type"] == "file"}
    everything: dict[str, Any] = filesystem.find(root, detail=True)
    return everything


def _unreachable(location: str, url: str, hub: bool, error: Exception) -> str:
    if not hub:
        return f"{location}: cannot be listed ({_words(error)})"
    name = url.removeprefix("hf://datasets/")
    return (
        f"{location}: there is no such file or folder, and the hub did not list {url} ({_words(error)}). Check the "
        f"name and the network, or fetch it elsewhere (`hf download --repo-type dataset {name} --local-dir FOLDER`) "
        "and give that folder instead"
    )


def _words(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__


def _fsspec() -> Any:
    try:
        import fsspec
    except ImportError as error:
        raise ConfigError("this kind of source needs fsspec: pip install 'alignvlm_pl[prepare]'") from error
    return fsspec
