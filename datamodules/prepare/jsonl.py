"""`prepare jsonl`: DocDownstream-style jsonl and its images -> shards and manifest, shuffled once for all.

datamodules/prepare/sources/jsonl.py shows a line. Two runs give the same bytes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from .pack.engine import pack, print_yield
from .pack.options import add_options
from .sources.jsonl import JsonlData


def main(argv: Sequence[str]) -> int:
    """Command line of `prepare jsonl`; prints what was written and what was skipped."""
    parser = argparse.ArgumentParser(prog="prepare jsonl", description=__doc__, allow_abbrev=False)
    parser.add_argument("jsonl", type=Path, help="file with one record per line")
    parser.add_argument(
        "--image-root", type=Path, help="folder the image paths are relative to (default: the file's folder)"
    )
    parser.add_argument("--start", type=int, default=0, help="skip the first records of the file")
    add_options(parser)
    options = parser.parse_args(list(argv))
    raw = JsonlData(
        path=options.jsonl,
        image_root=options.image_root or options.jsonl.parent,
        source=options.source or options.name or options.out.resolve().name,
        start=options.start,
    )
    print_yield(pack(raw, options))
    return 0
