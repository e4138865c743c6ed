"""`prepare bigdocs`: one config of BigDocs-7.5M (parquet) -> globally shuffled shards.

ArxivOCR, ArxivTableCap and cord-v2 hold their images. The others name them in img_id: give their folder with
--image-root. TabFact and WikiTQ name tables that are published without images: a page of each is rendered first.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from alignvlm_pl.errors import ConfigError

from ..shards.columns import BIGDOCS
from ..shards.sample import SampleError
from ..shards.sample_formats import as_list, conversation, pairs
from ..storage.stored_files import canonical_split
from .input_files import add_parquet_options, parquet_files
from .pack.work_folder import fetched_folder
from .sources.images import EncodedImage, FolderIndex, ImageFolder, embedded_image
from .sources.parquet_rows import ParquetRows
from .sources.source import SourceSample

WITH_IMAGES = ("ArxivOCR", "ArxivTableCap", "cord-v2")
BENCHMARKS = ("TabFact", "WikiTQ")
"""Configs whose validation and test rows are questions of benchmarks."""
CONFIGS = (*WITH_IMAGES, "COCOtext", "pubtables-1m", "TextOCR", "Open4Business", *BENCHMARKS)

_NAME = "img_id"
_PROVENANCE = ("query_info", "annotation_info", "image_info", "license", "licence", "dataset_name", "source")
_TASKS = ("task_name", "task")


@dataclass(frozen=True, kw_only=True)
class BigDocs(ParquetRows):
    """The rows of one config."""

    name: str = "bigdocs"
    license: str = "CC-BY-4.0"
    images: ImageFolder | None = None  # of rows that only name them; None: the rows must hold them
    schema = BIGDOCS
    optional = (_NAME, *_PROVENANCE, *_TASKS)

    def check_columns(self, columns: Mapping[str, str], *, where: str) -> None:
        """Raise a ConfigError where rows name images that no `--image-root` holds."""
        if columns["images"] == _NAME and self.images is None:
            raise ConfigError(
                f"{where} only names its images ({_NAME}): give their folder with --image-root (TabFact and WikiTQ "
                "name tables: render a page of each first, or take those of `prepare docdownstream`)"
            )

    def convert(self, row: Mapping[str, Any], columns: Mapping[str, str], *, where: str) -> SourceSample:
        """Convert a row; several queries become turns about the same images.

        Raises a SampleError where all annotations are empty.
        """
        asked = pairs(row[columns["queries"]], row[columns["answers"]], where=where)
        if not any(answer.strip() for _, answer in asked):
            raise SampleError(f"{where}: all annotations are empty", "empty_answer")
        images = self._images(row, columns["images"], where)
        kept = {name: row[name] for name in (*_PROVENANCE, _NAME) if row.get(name) is not None}
        record = {
            "id": f"{self.source}/{row[columns['id']]}",
            "source": self.source,
            "task": str(next((row[name] for name in _TASKS if row.get(name)), "document")),
            "messages": conversation(asked, num_images=len(images)),
            # Dates and the like become text.
            "meta": json.loads(json.dumps(kept, default=str)),
        }
        return SourceSample(record=record, images=images, where=where)

    def _images(self, row: Mapping[str, Any], column: str, where: str) -> list[EncodedImage]:
        cells = [cell for cell in as_list(row[column]) if cell is not None]
        if column != _NAME and cells:
            return [embedded_image(cell, where=where) for cell in cells]
        names = cells if column == _NAME else as_list(row.get(_NAME))
        if not names or self.images is None:
            raise SampleError(f"{where}: the row holds no image", "missing_image")
        return [self.images.find(str(name), where=where) for name in names]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the kind."""
    add_parquet_options(parser, hub_id="ServiceNow/BigDocs-7.5M", configs=CONFIGS)
    parser.add_argument("--image-root", type=Path, help="folder of the images that rows name in img_id")
    parser.add_argument(
        "--allow-benchmark-splits",
        action="store_true",
        help="allow validation and test rows of TabFact and WikiTQ, which are benchmarks",
    )


def open_source(options: argparse.Namespace) -> BigDocs:
    """Return the raw data, or raise ConfigError where an option does not fit the config or this the files."""
    config = options.config = options.config or _named_config(options.input)
    if not config:
        raise ConfigError(f"{options.input} does not name its config: give it with --config ({', '.join(CONFIGS)})")
    split = canonical_split(options.split or "")
    if config in BENCHMARKS and split in ("val", "test") and not options.allow_benchmark_splits:
        raise ConfigError(
            f"--split {options.split}: the {split} split of {config} is a benchmark of the paper, training on it would "
            "void the score; use --split train, or --allow-benchmark-splits"
        )
    files = parquet_files(options)
    for file in files:
        if (named := _named_config(file.path)) and config not in PurePosixPath(file.path).parts:
            raise ConfigError(f"{file.path} is of config {named}, not {config}")
    root = options.image_root
    if config in WITH_IMAGES and root:
        raise ConfigError(f"{config} holds its images: remove --image-root")
    images = ImageFolder(root=root, index=FolderIndex(root)) if root else None
    return BigDocs(
        files=files,
        fetched=fetched_folder(options.out),
        images=images,
        source=options.source or f"bigdocs/{config}",
    )


def _named_config(place: str) -> str:
    return next((part for part in reversed(PurePosixPath(place).parts) if part in CONFIGS), "")
