"""Files of a dataset: on this disk, or of a hub or another store that fsspec lists, of which they are fetched.

Hub layout: `<config>/<split>-00000-of-00012.parquet`, or `data/<split>-….parquet` where a dataset has one config.
"""

import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path, PurePosixPath

from alignvlm_pl.errors import ConfigError, DataError

from .fetching import SCHEMES, Expected, fetch
from .file_kinds import compressed_name, is_companion

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
_SPLIT_NAME = re.compile(rf"({'|'.join(sorted(_SPLITS, key=len, reverse=True))})(?![A-Za-z])")


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """One file: its URL for fsspec, its path, or the URL of a remote one, for errors, and its size in bytes."""

    url: str
    path: str
    size: int

    @property
    def name(self) -> str:
        """Return the last part of its path."""
        return PurePosixPath(self.path).name

    @property
    def folders(self) -> tuple[str, ...]:
        """Return the parts of its path before its name."""
        return PurePosixPath(self.path).parts[:-1]

    @property
    def local(self) -> bool:
        """Whether it is on this disk."""
        return self.url.startswith("file://")

    @property
    def split(self) -> str | None:
        """Return ``train``, ``val`` or ``test``, from its name or else its folder; None if neither says."""
        match = _SPLIT_NAME.match(self.name)
        return _SPLITS[match[1]] if match else _SPLITS.get(PurePosixPath(self.path).parent.name)


@contextmanager
def local_copy(file: StoredFile, folder: Path) -> Iterator[Path]:
    """Yield the path of a file; a remote one is fetched into `folder` (`fetch_file`), and removed once it is read.

    It stays where the block is left early: a resumed run uses it. A damaged one, a DataError of the block, does not.
    """
    if file.local:
        yield Path(file.path)
        return
    path = fetch_file(file, folder)
    try:
        yield path
    except DataError:
        shutil.rmtree(path.parent, ignore_errors=True)
        raise
    shutil.rmtree(path.parent, ignore_errors=True)


def fetch_file(file: StoredFile, folder: Path) -> Path:
    """Return the path of a copy of a remote file in `folder`; one that is there already is used.

    Raises:
        ConfigError: Files cannot be fetched with the scheme of its URL.
        DataError: It cannot be fetched whole.
    """
    scheme = file.url.partition("://")[0]
    if scheme not in SCHEMES:
        raise ConfigError(f"{file.url}: files are fetched from {', '.join(SCHEMES)} only, found {scheme}://")
    return fetch(file.url, cache=folder, expected=Expected(bytes=file.size or None))


def local_file(path: Path) -> StoredFile:
    """Return a file of this disk; raise DataError where there is none."""
    if not path.is_file():
        raise DataError(f"there is no {path}")
    return StoredFile(url=f"file://{path.absolute()}", path=str(path), size=path.stat().st_size)


def find_file(place: str) -> StoredFile:
    """Return the file at a path or a URL; raise DataError where there is none, or the store does not respond."""
    if "://" not in place:
        return local_file(Path(place))
    found = list_folder(place)
    if len(found) != 1 or found[0].name != place.rpartition("/")[2]:
        raise DataError(f"{place} is no file")
    return found[0]


def list_files(location: str, ending: str) -> list[StoredFile]:
    """List the files with an ending at a path (file, folder, pattern), a URL, or in a dataset of the hub, sorted.

    Companions such as ``._a.tar`` are no files of a dataset. DataError: there are none, or the store fails.

    Args:
        location: For example ``data/bigdocs``, ``data/*.parquet``, ``memory://set`` or ``ServiceNow/BigDocs-7.5M``.
        ending: For example ``.parquet``; letter case does not matter.
    """
    everything = _list(location, deep=True)
    named = [file for file in everything if file.path.lower().endswith(ending)]
    # A hidden folder that holds them all is the user's choice.
    shared = _shared_parts([file.folders for file in everything])
    own = [file for file in named if not is_companion("/".join((*file.folders[shared:], file.name)))]
    if files := named if len(everything) == 1 else own:
        return files
    if packed := compressed_name((file.path for file in everything), ending):
        raise DataError(f"{location}: no {ending} file there; {packed}")
    where = _url(location)[0].removeprefix("file://")
    raise DataError(f"{location}: no {ending} file there (looked at {where}, {len(everything)} other files)")


def list_folder(location: str) -> list[StoredFile]:
    """List the files directly in a folder, at a URL or in a dataset of the hub; for a file, only itself.

    Errors as in `list_files`, but an empty folder is none.
    """
    return _list(location, deep=False)


def choose_files(files: Sequence[StoredFile], *, config: str | None, split: str | None, where: str) -> list[StoredFile]:
    """Keep the files of a config and a split; a part that no path names is not filtered by.

    `config` is the name of their folder; a ConfigError where there are several and none is chosen. `split` is
    ``train``, ``val`` or ``test``, or an alias; a DataError that names the location as `where`, where no file is of it.
    """
    folders = sorted({str(PurePosixPath(file.path).parent) for file in files})
    configs = _configs(files)
    if config is None and len(configs) > 1:
        raise ConfigError(f"{where} holds several configs, name one with --config: {', '.join(configs)}")
    if len(configs) > 1:
        files = [file for file in files if config in PurePosixPath(file.path).parts]
        if not files:
            raise DataError(f"{where}: no files of config {config!r}; found: {', '.join(configs)}")
    wanted = _SPLITS.get(split or "", split)
    if split is None or not any(file.split for file in files):
        return list(files)
    if kept := [file for file in files if file.split == wanted]:
        return kept
    splits = sorted({file.split or "unnamed" for file in files})
    raise DataError(f"{where}: no files of split {split!r} in {', '.join(folders)[:200]}; found: {', '.join(splits)}")


def short_names(files: Sequence[StoredFile]) -> list[str]:
    """Return names of files, with their folder where several files have one name."""
    names = [file.name for file in files]
    return names if len(set(names)) == len(names) else [file.path for file in files]


def canonical_split(name: str) -> str:
    """Return ``train``, ``val`` or ``test`` for any of their names; another name as it is."""
    return _SPLITS.get(name, name)


def _configs(files: Collection[StoredFile]) -> list[str]:
    """Return the names of the files' folders, without folders of splits and the part that all share."""
    folders = [[part for part in file.folders if part not in _SPLITS] for file in files]
    shared = _shared_parts(folders)
    return sorted({parts[shared] if len(parts) > shared else "." for parts in folders})


def _shared_parts(paths: Sequence[Sequence[str]]) -> int:
    """Return how many parts all paths begin with."""
    return sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))


def _url(location: str) -> tuple[str, bool]:
    """Return fsspec's URL of a location, and whether it is a dataset of the hub."""
    if "://" in location:
        return location, location.startswith("hf://")
    if not Path(location).exists() and _HUB_ID.fullmatch(location) and not Path(location).parent.is_dir():
        return f"hf://datasets/{location}", True
    return f"file://{Path(location).absolute()}", False


def _list(location: str, *, deep: bool) -> list[StoredFile]:
    """Return the file at a location, or the files in the folder or below it or of the pattern, sorted by path."""
    import fsspec.core

    url, hub = _url(location)
    try:
        filesystem, root = fsspec.core.url_to_fs(url)
        there = filesystem.exists(root)
        if there and filesystem.isfile(root):
            found = {root: filesystem.info(root)}
        elif there and not deep:
            found = {info["name"]: info for info in filesystem.ls(root, detail=True)}
        else:
            found = (filesystem.find if there else filesystem.glob)(root, detail=True) if deep else {}
    except Exception as error:  # each store has its own errors, and few of them are OSErrors
        raise DataError(_unlisted_message(location, url, hub, error)) from error
    if not there and not found:
        raise DataError(f"{location}: there is no such file or folder, or nothing fits the pattern")
    return [
        StoredFile(url=full, path=full.removeprefix("file://"), size=int(info["size"] or 0))
        for path, info in sorted(found.items())
        if info["type"] == "file"
        for full in [filesystem.unstrip_protocol(path)]
    ]


def _unlisted_message(location: str, url: str, hub: bool, error: Exception) -> str:
    if not hub:
        return f"{location}: cannot be listed ({_format_error(error)})"
    name = url.removeprefix("hf://datasets/")
    return (
        f"{location}: there is no such file or folder, and the hub did not list {url} ({_format_error(error)}). "
        f"Check the name and the network, or fetch it elsewhere (`hf download --repo-type dataset {name} "
        "--local-dir FOLDER`) and give that folder instead"
    )


def _format_error(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__
