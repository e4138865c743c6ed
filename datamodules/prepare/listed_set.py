"""A published set of a list and something beside it: which files it has, and its list on this disk."""

from collections.abc import Sequence
from pathlib import Path

from alignvlm_pl.errors import ConfigError, DataError

from ..shards.manifest import MANIFEST_NAME
from ..storage.fetching import fetch
from ..storage.stored_files import StoredFile
from ..storage.transfer import PACKAGES
from .pack.options import PackOptions
from .pack.work_folder import WORK_FOLDER

_NAMES = 12


def choose_list(files: Sequence[StoredFile], name: str, *, where: str, expected: str) -> StoredFile:
    """Return the list of a set.

    Args:
        files: Those right in the set's folder.
        name: Of the list.
        where: How errors name the set.
        expected: What else such a set holds, for errors.

    Raises:
        DataError: It has no such list.
    """
    for file in files:
        if file.name == name:
            return file
    names = ", ".join(file.name for file in files[:_NAMES]) or "no files"
    more = f" and {len(files) - _NAMES} more" if len(files) > _NAMES else ""
    raise DataError(
        f"{where} holds no {name}; expected {expected}, found {names}{more}; name the list with --file"
    )


def fetched_list(file: StoredFile, options: PackOptions) -> Path:
    """Return the path of a whole list: a stored one is copied into the working folder, which goes with the last shard.

    An interrupted run finds the copy there and fetches nothing; a list of another size is fetched again.

    Raises:
        ConfigError: Its store is none that lists are fetched from.
        DataError: It cannot be fetched whole, or the output folder holds a finished set.
    """
    if file.local:
        return Path(file.path)
    scheme = file.url.partition("://")[0]
    if scheme not in PACKAGES:
        raise ConfigError(f"{file.url}: lists are fetched from {', '.join(PACKAGES)} only, found {scheme}://")
    work = options.out / WORK_FOLDER
    if (options.out / MANIFEST_NAME).exists() and not (options.overwrite or work.exists()):
        raise DataError(
            f"{options.out} already holds a finished set; choose another folder or allow overwriting"
        )
    return fetch(file.url, cache=work / "fetched", expected_bytes=file.size or None)
