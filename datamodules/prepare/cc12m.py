"""`prepare cc12m`: tars of pictures and captions as img2dataset packs them -> shards, shuffled once for all."""

import argparse
from collections.abc import Sequence

from ..shards.sample_formats import CAPTION_PROMPT
from ..storage.stored_files import list_files
from .pack.command import add_options, pack, print_yield
from .sources.cc12m import CaptionTars


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="prepare cc12m", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "input",
        help="tar, folder, pattern, address that fsspec opens, or set of the hub such as pixparse/cc12m-wds",
    )
    parser.add_argument(
        "--prompt", default=CAPTION_PROMPT, help="text of the user's turn (default: %(default)s)"
    )
    add_options(parser)
    options = parser.parse_args(list(argv))
    files = tuple(list_files(options.input, ".tar"))
    raw = CaptionTars(files=files, prompt=options.prompt, source=options.source or "cc12m")
    print_yield(pack(raw, options))
    return 0
