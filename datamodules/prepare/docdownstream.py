"""`prepare docdownstream`: lines of DocDownstream-1.0, and a folder of their pages -> globally shuffled shards.

The pages are published as one archive in pieces, which is unpacked first: `cat partial-imgs.* | tar -xz -C FOLDER`.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignvlm_pl.errors import require_known

from ..storage.file_kinds import path_text
from .input_files import fetched_list, find_list, image_folder
from .pack.options import PackOptions
from .sources.json_files import require_lines
from .sources.record_files import RecordFile, parsed


@dataclass(frozen=True, kw_only=True)
class DocDownstreamFolder(RecordFile):
    """Lines whose pages lie in a folder."""

    name: str = "docdownstream"
    source: str = "docdownstream"
    license: str = "Apache-2.0"
    sources: tuple[str, ...] = ()  # values of `dataset_name` to keep; empty: all

    def check(self) -> None:
        """Check the schema of the lines; raise ConfigError where one of the `sources` does not occur."""
        require_lines(self.path)
        super().check()
        if not self.sources:
            return
        records = parsed(text for _, text in self.raw())
        names = {str(record.get("dataset_name")) for record in records if isinstance(record, Mapping)}
        for name in self.sources:
            require_known(name, names, f"--sources: {self.label} has no lines of {name!r}")

    def is_wanted(self, given: dict[str, Any]) -> bool:
        return not self.sources or given.get("dataset_name") in self.sources

    def convert(self, given: dict[str, Any], number: int, *, num_images: int, marked: bool) -> dict[str, Any]:
        record = super().convert(given, number, num_images=num_images, marked=marked)
        record.setdefault("id", f"{path_text(self.path.stem)}/{number}")
        return record


_LIST = "train.jsonl"
_PIECES = "partial-imgs."
_LAYOUT = f"{_LIST} or val.jsonl beside {_PIECES}00, {_PIECES}01"
_UNPACK = f"cat {_PIECES}* | tar -xz -C FOLDER"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the kind."""
    parser.add_argument(
        "input",
        help="train.jsonl or val.jsonl, or what holds it: a folder, an address, or a dataset of the hub, "
        "mPLUG/DocDownstream-1.0",
    )
    parser.add_argument("--file", help=f"the lines of a folder or dataset (default: {_LIST})")
    parser.add_argument(
        "--image-root",
        type=Path,
        help=f"folder the image paths are relative to, which {_UNPACK!r} fills (default: that of the lines)",
    )
    parser.add_argument("--sources", nargs="+", default=[], help="keep lines of these datasets only, such as DocVQA")


def open_source(options: argparse.Namespace) -> DocDownstreamFolder:
    """Return the raw data, or raise ConfigError where an option does not fit the others."""
    chosen, beside = find_list(options, _LIST, expected=_LAYOUT)
    pages = image_folder(options, chosen, beside, archive=_PIECES, unpack=_UNPACK)
    return DocDownstreamFolder(
        path=fetched_list(chosen, PackOptions.from_args(options)),
        origin="" if chosen.local else chosen.path,
        sources=tuple(options.sources),
        source=options.source or "docdownstream",
        image_root=pages,
    )
