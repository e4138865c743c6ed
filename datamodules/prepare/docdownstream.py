"""`prepare docdownstream`: lines of DocDownstream-1.0, with their pages in a folder or in the published archive.

The archive is read in its pieces as one stream: it is neither joined nor unpacked on the disk, and of a set of the hub
only the lines are stored while the command runs.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from alignvlm_pl.errors import ConfigError, DataError

from ..storage.stored_files import StoredFile, find_file, list_folder
from .listed_set import choose_list, fetched_list
from .pack.command import add_options, pack, print_yield
from .pack.options import PackOptions
from .pack.source import RawData
from .sources.docdownstream_archive import DocDownstreamArchive
from .sources.docdownstream_rows import DocDownstreamFolder, DocumentLines
from .sources.pictures import PictureFolder

_LIST = "train.jsonl"
_PIECES = "partial-imgs."
_LAYOUT = f"{_LIST} or val.jsonl beside {_PIECES}00, {_PIECES}01"


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="prepare docdownstream", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "input",
        help="train.jsonl or val.jsonl, or what holds it beside the archive's pieces: a folder, an address, or a set "
        "of the hub, mPLUG/DocDownstream-1.0",
    )
    parser.add_argument("--file", help=f"the lines of a folder or set (default: {_LIST})")
    pages = parser.add_mutually_exclusive_group()
    pages.add_argument(
        "--image-root",
        type=Path,
        help="folder the image paths are relative to (default: that of the lines, where no archive is beside them)",
    )
    pages.add_argument(
        "--archive",
        nargs="+",
        metavar="PIECE",
        help=f"all pieces: {_PIECES}00 {_PIECES}01, or a folder or set that holds them",
    )
    parser.add_argument(
        "--sources", nargs="+", default=[], help="keep lines of these sets only, such as DocVQA"
    )
    add_options(parser)
    options = parser.parse_args(list(argv))
    print_yield(pack(_raw(options), options))
    return 0


def _raw(options: argparse.Namespace) -> RawData:
    chosen, pieces = _files(options)
    source = options.source or "docdownstream"
    if not pieces and not chosen.local and not options.image_root:
        raise ConfigError(
            f"{chosen.path} does not lie on this disk, and neither --archive nor --image-root says where its pages are"
        )
    lines = DocumentLines(
        path=fetched_list(chosen, PackOptions.of(options)),
        origin="" if chosen.local else chosen.path,
        sources=tuple(options.sources),
    )
    if pieces:
        return DocDownstreamArchive(lines=lines, pieces=tuple(pieces), source=source)
    root = options.image_root or Path(chosen.path).parent
    return DocDownstreamFolder(lines=lines, pictures=PictureFolder(root=root), source=source)


def _files(options: argparse.Namespace) -> tuple[StoredFile, list[StoredFile]]:
    """Return the file of the lines, and the pieces of the archive where the pages come from one."""
    given = [piece for place in options.archive or () for piece in _pieces(place)]
    if Path(options.input).is_file() or options.input.endswith(".jsonl"):
        if options.file:
            raise ConfigError(f"--file chooses a file of a folder or set, but {options.input} is one file")
        return find_file(options.input), given
    beside = list_folder(options.input)
    lines = choose_list(beside, options.file or _LIST, where=options.input, expected=_LAYOUT)
    pieces = given or [file for file in beside if file.name.startswith(_PIECES)]
    return lines, [] if options.image_root else pieces


def _pieces(place: str) -> list[StoredFile]:
    """Return the piece at a place, or all pieces that a folder or set holds."""
    if Path(place).is_file() or place.rpartition("/")[2].startswith(_PIECES):
        return [find_file(place)]
    found = list_folder(place)
    if pieces := [file for file in found if file.name.startswith(_PIECES)]:
        return pieces
    names = ", ".join(file.name for file in found[:12]) or "no files"
    raise DataError(f"--archive {place}: expected a piece, or {_PIECES}00 and so on in it, found {names}")
