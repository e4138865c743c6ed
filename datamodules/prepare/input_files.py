"""The files that a `prepare` command reads: options and choice of parquet files, and lists copied to this disk."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from alignvlm_pl.errors import ConfigError, DataError

from ..shards.manifest import MANIFEST_NAME
from ..storage.file_kinds import compressed_name
from ..storage.stored_files import StoredFile, choose_files, fetch_file, find_file, list_files, list_folder
from .pack.options import PackOptions
from .pack.work_folder import fetched_folder

DEFAULT_SPLIT = "train"
_NAMES = 12


def add_parquet_options(parser: argparse.ArgumentParser, *, hub_id: str, configs: Sequence[str] | None = None) -> None:
    """Add the options of parquet files; a config is one of `configs`, None: of any name."""
    parser.add_argument(
        "input",
        help=f"parquet file, folder, pattern, URL (http, https, s3, gs, hf), or dataset of the hub such as {hub_id}",
    )
    parser.add_argument("--split", help=f"files of this split (default: {DEFAULT_SPLIT})")
    parser.add_argument("--config", choices=configs, help="folder of a dataset that has several")


def parquet_files(options: argparse.Namespace) -> tuple[StoredFile, ...]:
    """Return the files that `add_parquet_options` parsed.

    Raises:
        ConfigError: Files of several configs are there and none is chosen.
        DataError: There are no such files, or the store does not respond.
    """
    found = list_files(options.input, ".parquet")
    return tuple(choose_files(found, config=options.config, split=options.split or DEFAULT_SPLIT, where=options.input))


def find_list(options: argparse.Namespace, default: str, *, expected: str) -> tuple[StoredFile, list[StoredFile]]:
    """Return the list that `input` and `--file` name, and all files beside it where a folder or dataset is given.

    Raises:
        ConfigError: `--file` is given for one file.
        DataError: There is no such list; the message names what is `expected` and what is there.
    """
    place, name = options.input, options.file or default
    if Path(place).is_file() or place.lower().endswith((".json", ".jsonl")):
        if options.file:
            raise ConfigError(f"--file chooses a file of a folder or dataset, but {place} is one file")
        return find_file(place), []
    files = list_folder(place)
    if found := next((file for file in files if file.name == name), None):
        return found, files
    packed = compressed_name((file.name for file in files if file.name.startswith(name)), name)
    advice = packed or "name the list with --file"
    raise DataError(f"{place} holds no {name}; expected {expected}, found {_first_names(files)}; {advice}")


def given_image_root(options: argparse.Namespace, *, unpack: str) -> Path | None:
    """Return ``--image-root``; ConfigError where it is no folder: an archive is unpacked by the command `unpack`."""
    root: Path | None = options.image_root
    if root and not root.is_dir():
        found = f"a file; unpack it (`{unpack}`)" if root.is_file() else "nothing; check the path"
        raise ConfigError(f"--image-root {root}: expected a folder, found {found}")
    return root


def image_folder(
    options: argparse.Namespace, listed: StoredFile, beside: Sequence[StoredFile], *, archive: str, unpack: str
) -> Path:
    """Return the folder of the images of a list: ``--image-root``, or else the folder that it lies in on this disk.

    The images are published as `archive`, the beginning of file names, which the command `unpack` unpacks. ConfigError:
    no folder is given and the archive lies `beside` the list, or the list is remote; or as `given_image_root`.
    """
    if root := given_image_root(options, unpack=unpack):
        return root
    if not listed.local or any(file.name.startswith(archive) for file in beside):
        raise ConfigError(
            f"the images of {listed.path} are published as {archive}: fetch and unpack it (`{unpack}`), and name the "
            "folder with --image-root"
        )
    return Path(listed.path).parent


def _first_names(files: Sequence[StoredFile]) -> str:
    """List the names of a few files."""
    more = f" and {len(files) - _NAMES} more" if len(files) > _NAMES else ""
    return (", ".join(file.name for file in files[:_NAMES]) or "no files") + more


def fetched_list(file: StoredFile, options: PackOptions) -> Path:
    """Return the local path of a list; a remote one is copied into the working folder, which is removed at the end.

    A resumed run uses the copy; a list of another size is fetched again.

    Raises:
        ConfigError: Lists cannot be fetched with the scheme of its URL.
        DataError: It cannot be fetched whole, or the output folder holds a finished dataset.
    """
    if file.local:
        return Path(file.path)
    folder = fetched_folder(options.out)
    if (options.out / MANIFEST_NAME).exists() and not (options.overwrite or folder.parent.exists()):
        raise DataError(f"{options.out} already holds a finished dataset; choose another folder or allow overwriting")
    return fetch_file(file, folder)
