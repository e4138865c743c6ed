"""`python cli.py prepare <kind> …`: convert data of other formats to shards, without importing torch.

The module of a kind is imported when the kind is run. It has a `main`, or what `pack` needs: `add_arguments` and
`open_source`, which returns the raw data.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from alignvlm_pl.errors import ConfigError, require_known

_KINDS = {
    "jsonl": ("datamodules.prepare.jsonl", "DocDownstream-style jsonl and images -> shards and manifest"),
    "index": ("datamodules.prepare.index", "manifest and sample indexes for shards made elsewhere (img2dataset)"),
    "synthetic": (
        "datamodules.prepare.synthetic.command",
        "rendered documents with questions and text lines -> shards",
    ),
    "sroie": ("datamodules.prepare.sroie", "real receipts -> pages with questions, line crops"),
    "benchmark": ("datamodules.prepare.benchmark", "a benchmark's published file -> shards and manifest"),
    "cc12m": ("datamodules.prepare.cc12m", "tars of images and captions (img2dataset) -> shuffled shards"),
    "bigdocs": ("datamodules.prepare.bigdocs", "BigDocs-7.5M, parquet of any config -> shuffled shards"),
    "docdownstream": ("datamodules.prepare.docdownstream", "DocDownstream-1.0, its archive -> shuffled shards"),
    "llava": ("datamodules.prepare.llava", "LLaVA-558K or LLaVA-NeXT -> shuffled shards"),
    "vcr": ("datamodules.prepare.vcr", "VCR-wiki, parquet -> shuffled shards"),
    "folder": ("datamodules.prepare.folder", "images with .txt or .json beside them -> shuffled shards"),
    "embedded": ("datamodules.prepare.embedded", "the embedded default weights -> cache folder"),
}


def main(argv: Sequence[str]) -> int:
    """Run a kind, with its name and its own arguments, and return the exit code; ``--help`` lists the kinds.

    Raises:
        ConfigError: No kind, or an unknown one, with the nearest known one.
    """
    if not argv:
        raise ConfigError(f"prepare: a kind is missing; there are {', '.join(_KINDS)}")
    if argv[0] in ("-h", "--help"):
        sys.stdout.write("usage: prepare <kind> [options], `prepare <kind> --help` for its options\n\n")
        for kind, (_, summary) in _KINDS.items():
            sys.stdout.write(f"  {kind:13s} {summary}\n")
        return 0
    kind, *rest = argv
    require_known(kind, _KINDS, f"prepare: unknown kind '{kind}'")
    module = import_module(_KINDS[kind][0])
    if hasattr(module, "main"):
        module.main(rest)
    else:
        _pack(kind, module, rest)
    return 0


def _pack(kind: str, module: Any, argv: Sequence[str]) -> None:
    from .pack.engine import pack, print_yield
    from .pack.options import add_options

    parser = argparse.ArgumentParser(prog=f"prepare {kind}", description=module.__doc__, allow_abbrev=False)
    module.add_arguments(parser)
    add_options(parser)
    options = parser.parse_args(argv)
    print_yield(pack(module.open_source(options), options))
