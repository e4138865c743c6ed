"""`prepare folder`: pictures with texts beside them -> shards, shuffled once for all.

Beside `a.png` lies `a.txt` (caption or transcription, asked for by --prompt), or `a.json` with
`{"question", "answer"}`, `{"qa": [{"question", "answer"}]}` or `{"messages": [...]}`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..shards.sample_formats import CAPTION_PROMPT
from .pack.command import add_options, pack, print_yield
from .sources.sidecars import SidecarFolder


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="prepare folder", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "input", type=Path, help="folder of the pictures; those of folders in it are taken too"
    )
    parser.add_argument(
        "--prompt",
        default=CAPTION_PROMPT,
        help="text of the user's turn before a .txt (default: %(default)s)",
    )
    add_options(parser)
    options = parser.parse_args(list(argv))
    name = options.input.resolve().name
    raw = SidecarFolder(root=options.input, prompt=options.prompt, name=name, source=options.source or name)
    print_yield(pack(raw, options))
    return 0
