"""`prepare docdownstream`: lines of DocDownstream-1.0, with their pages in a folder or in the published archive.

The archive is read in its pieces as one stream: it is neither joined nor unpacked on the disk.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..pack.command import add_options, pack, print_yield
from ..pack.source import RawData
from ..sources.docdownstream_archive import DocDownstreamArchive
from ..sources.docdownstream_rows import DocDownstreamFolder, DocumentLines
from ..sources.pictures import PictureFolder


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="prepare docdownstream", description=__doc__, allow_abbrev=False)
    parser.add_argument("input", type=Path, help="train.jsonl or val.jsonl")
    pages = parser.add_mutually_exclusive_group()
    pages.add_argument(
        "--image-root", type=Path, help="folder the image paths are relative to (default: the file's folder)"
    )
    pages.add_argument(
        "--archive", type=Path, nargs="+", metavar="PIECE", help="all pieces: partial-imgs.00 partial-imgs.01"
    )
    parser.add_argument(
        "--sources", nargs="+", default=[], help="keep lines of these sets only, such as DocVQA"
    )
    add_options(parser)
    options = parser.parse_args(list(argv))
    lines = DocumentLines(path=options.input, sources=tuple(options.sources))
    source = options.source or "docdownstream"
    raw: RawData
    if options.archive:
        raw = DocDownstreamArchive(lines=lines, pieces=tuple(options.archive), source=source)
    else:
        root = options.image_root or options.input.parent
        raw = DocDownstreamFolder(lines=lines, pictures=PictureFolder(root=root), source=source)
    print_yield(pack(raw, options))
    return 0
