"""`prepare vcr`: VCR-wiki, pictures with partly covered captions -> shards, shuffled once for all."""

import argparse
import re
from collections.abc import Sequence

from .files_options import add_parquet_options, parquet_files
from .pack.command import add_options, pack, print_yield
from .sources.vcr import PROMPT, VCRRows

_VARIANT = re.compile(r"VCR-wiki-(en|zh)-(easy|hard)", re.IGNORECASE)


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="prepare vcr", description=__doc__, allow_abbrev=False)
    add_parquet_options(parser, hub_id="vcr-org/VCR-wiki-en-easy")
    parser.add_argument("--config", help="folder of the set, where it has several")
    parser.add_argument("--prompt", default=PROMPT, help="text of the user's turn (default: %(default)s)")
    add_options(parser)
    options = parser.parse_args(list(argv))
    variant = _VARIANT.search(options.input)
    source = options.source or (variant[0].lower() if variant else "vcr-wiki")
    raw = VCRRows(files=parquet_files(options, config=options.config), prompt=options.prompt, source=source)
    print_yield(pack(raw, options))
    return 0
