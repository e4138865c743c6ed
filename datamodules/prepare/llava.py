"""`prepare llava`: LLaVA-558K (a JSON list and its pictures) or LLaVA-NeXT (parquet) -> shards, shuffled once for all.

The pictures of the list lie in a folder, or in the published zip, which is read where it is and not unpacked.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from alignvlm_pl.errors import ConfigError

from ..storage.stored_files import StoredFile, find_file, list_files, list_folder
from .files_options import add_parquet_options, parquet_files
from .listed_set import choose_list, fetched_list
from .pack.command import add_options, pack, print_yield
from .pack.options import PackOptions
from .pack.source import RawData
from .sources.llava import LLaVAList, LLaVARows
from .sources.llava_zip import LLaVAZip
from .sources.pictures import PictureFolder

_LIST = "blip_laion_cc_sbu_558k.json"
_ZIP = "images.zip"


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="prepare llava", description=__doc__, allow_abbrev=False)
    hub_id = "lmms-lab/LLaVA-NeXT-Data or liuhaotian/LLaVA-Pretrain; or LLaVA-558K's .json file"
    add_parquet_options(parser, hub_id=hub_id)
    parser.add_argument("--config", help="folder of the parquet files, where a set has several")
    parser.add_argument(
        "--file", help=f"the list of a folder or set without parquet files (default: {_LIST})"
    )
    parser.add_argument(
        "--image-root",
        help="folder of the pictures that are only named, or for a list a .zip, which may be an address (default: "
        f"{_ZIP} in the same folder or set, or else the list's folder)",
    )
    add_options(parser)
    options = parser.parse_args(list(argv))
    print_yield(pack(_raw(options), options))
    return 0


def _raw(options: argparse.Namespace) -> RawData:
    place, root = options.input, options.image_root
    if place.endswith(".jsonl"):
        raise ConfigError(
            f"{place}: LLaVA's records are read from one JSON list (.json) or from parquet files; make its lines a "
            "list, for example with `jq -s .`"
        )
    if place.endswith(".json"):
        if options.file:
            raise ConfigError(f"--file chooses a file of a folder or set, but {place} is one file")
        return _list(options, find_file(place), None)
    if options.file or _is_list_set(place):
        beside = list_folder(place)
        expected = f"parquet files, or {_LIST} beside {_ZIP}"
        file = choose_list(beside, options.file or _LIST, where=place, expected=expected)
        return _list(options, file, next((file for file in beside if file.name == _ZIP), None))
    if _is_zip(root):
        raise ConfigError(f"--image-root {root}: pictures of parquet rows are read from a folder; unpack it")
    return LLaVARows(
        files=parquet_files(options, config=options.config),
        pictures=PictureFolder(root=Path(root)) if root else None,
        source=options.source or "llava-next",
    )


def _is_list_set(place: str) -> bool:
    """Whether a folder or set holds a list: json files or the zip, and no parquet file anywhere."""
    if any(mark in place for mark in "*?["):
        return False
    names = [file.name for file in list_folder(place)]
    return any(name.endswith(".json") or name == _ZIP for name in names) and not any(
        file.name.endswith(".parquet") for file in list_files(place, "")
    )


def _list(options: argparse.Namespace, file: StoredFile, beside: StoredFile | None) -> RawData:
    """Take the records of a list, with pictures of a folder or of a zip, such as the one beside it."""
    if options.config or options.split:
        raise ConfigError(f"--config and --split choose parquet files, but {file.path} is one list")
    root = options.image_root
    zipped = find_file(root) if _is_zip(root) else None if root else beside
    if not zipped and not root and not file.local:
        raise ConfigError(
            f"{file.path} does not lie on this disk and no {_ZIP} is in its set; name its pictures with --image-root"
        )
    path = fetched_list(file, PackOptions.of(options))
    origin, source = "" if file.local else file.path, options.source or "llava"
    if zipped:
        return LLaVAZip(path=path, zip=zipped, origin=origin, source=source)
    pictures = PictureFolder(root=Path(root) if root else path.parent)
    return LLaVAList(path=path, pictures=pictures, origin=origin, source=source)


def _is_zip(root: str | None) -> bool:
    return root is not None and root.endswith(".zip")
