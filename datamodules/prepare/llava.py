"""`prepare llava`: LLaVA-558K (a JSON list and a folder) or LLaVA-NeXT (parquet) -> shards, shuffled once for all."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from alignvlm_pl.errors import ConfigError

from ..pack.command import add_options, pack, print_yield
from ..pack.source import RawData
from ..sources.llava import LLaVAList, LLaVARows
from ..sources.pictures import PictureFolder
from .files_options import add_parquet_options, parquet_files


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="prepare llava", description=__doc__, allow_abbrev=False)
    add_parquet_options(parser, hub_id="lmms-lab/LLaVA-NeXT-Data, or LLaVA-558K's .json file")
    parser.add_argument("--config", help="folder of the parquet files, where a set has several")
    parser.add_argument(
        "--image-root",
        type=Path,
        help="folder of the pictures that are only named (default: the folder of a .json file)",
    )
    add_options(parser)
    options = parser.parse_args(list(argv))
    print_yield(pack(_raw(options), options))
    return 0


def _raw(options: argparse.Namespace) -> RawData:
    path = Path(options.input)
    if path.suffix == ".jsonl":
        raise ConfigError(
            f"{path}: LLaVA's records are read from one JSON list (.json) or from parquet files; make its lines a "
            "list, for example with `jq -s .`"
        )
    if path.suffix == ".json":
        if options.config or options.split:
            raise ConfigError(f"--config and --split choose parquet files, but {path} is one list")
        pictures = PictureFolder(root=options.image_root or path.parent)
        return LLaVAList(path=path, pictures=pictures, source=options.source or "llava")
    return LLaVARows(
        files=parquet_files(options, config=options.config),
        pictures=PictureFolder(root=options.image_root) if options.image_root else None,
        source=options.source or "llava-next",
    )
