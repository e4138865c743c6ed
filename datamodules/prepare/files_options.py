"""Options of the kinds of `prepare` that read files of a published set, and how the files are found by them."""

import argparse

from ..storage.stored_files import StoredFile, choose_files, list_files

DEFAULT_SPLIT = "train"


def add_parquet_options(parser: argparse.ArgumentParser, *, hub_id: str) -> None:
    """Add the place of parquet files, and which of them are meant."""
    parser.add_argument(
        "input",
        help=f"parquet file, folder, pattern, address that fsspec opens, or set of the hub such as {hub_id}",
    )
    parser.add_argument("--split", help=f"files of this split (default: {DEFAULT_SPLIT})")


def parquet_files(options: argparse.Namespace, *, config: str | None) -> tuple[StoredFile, ...]:
    """Return the files that `add_parquet_options` parsed.

    Raises:
        ConfigError: Files of several configs are there and none is chosen.
        DataError: There are no such files, or the store does not answer.
    """
    found = list_files(options.input, ".parquet")
    return tuple(
        choose_files(found, config=config, split=options.split or DEFAULT_SPLIT, where=options.input)
    )
