"""`prepare bigdocs`: one config of BigDocs-7.5M (parquet) -> globally shuffled shards.

ArxivOCR, ArxivTableCap and cord-v2 hold their images. COCOtext, pubtables-1m, TextOCR and Open4Business name them: give
their folder with --image-root. TabFact and WikiTQ name tables, which are rendered: give the release with --tables.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from alignvlm_pl.errors import ConfigError

from ..shards.columns import BIGDOCS
from ..shards.sample import SampleError
from ..shards.sample_formats import as_list, conversation, pairs
from ..storage.stored_files import canonical_split
from .input_files import add_parquet_options, parquet_files
from .pack.work_folder import fetched_folder
from .rendered_tables.tabfact import FactTables
from .rendered_tables.table_questions import TableNames, TableRelease
from .rendered_tables.tables import render_table, to_png
from .rendered_tables.wtq import WikiTables
from .sources.images import EncodedImage, FolderIndex, ImageFolder, embedded_image
from .sources.parquet_rows import ParquetRows
from .sources.source import SourceSample

_KEPT = 32  # rendered tables in memory: consecutive rows often share a table


@dataclass(frozen=True, kw_only=True)
class RenderedTables:
    """Pages by the name of their table in a release."""

    names: TableNames = field(repr=False)
    release: TableRelease
    _rendered: dict[str, list[EncodedImage]] = field(default_factory=dict, repr=False, compare=False)

    def pages(self, name: str, *, where: str) -> list[EncodedImage]:
        """Return the pages of a table, or raise SampleError where it is unknown or cannot be rendered."""
        table = self.names.find(name)
        if table is None:
            raise SampleError(f"{where}: img_id {name!r:.120} names no table of the release", "unknown_table")
        if table not in self._rendered:
            try:
                pages: list[EncodedImage] = [(to_png(page), "png") for page in render_table(self.release.load(table))]
            except SampleError as error:
                raise SampleError(f"{where}: {error}", error.reason) from error
            if len(self._rendered) >= _KEPT:
                self._rendered.pop(next(iter(self._rendered)))
            self._rendered[table] = pages
        return self._rendered[table]


WITH_IMAGES = ("ArxivOCR", "ArxivTableCap", "cord-v2")
FROM_FOLDERS = ("COCOtext", "pubtables-1m", "TextOCR", "Open4Business")
FROM_TABLES = ("TabFact", "WikiTQ")
CONFIGS = (*WITH_IMAGES, *FROM_FOLDERS, *FROM_TABLES)

_NAME = "img_id"
_PROVENANCE = ("query_info", "annotation_info", "image_info", "license", "licence", "dataset_name", "source")
_TASKS = ("task_name", "task")
NamedImages = ImageFolder | RenderedTables
"""Images of rows that only name them."""


@dataclass(frozen=True, kw_only=True)
class BigDocs(ParquetRows):
    """The rows of one config."""

    name: str = "bigdocs"
    license: str = "CC-BY-4.0"
    images: NamedImages | None = None  # None: the rows must hold them
    schema = BIGDOCS
    optional = (_NAME, *_PROVENANCE, *_TASKS)

    def check_columns(self, columns: Mapping[str, str], *, where: str) -> None:
        """Raise a ConfigError where rows name images that no `--image-root` holds."""
        if columns["images"] == _NAME and self.images is None:
            raise ConfigError(
                f"{where} only names its images ({_NAME}): give their folder with --image-root, or for TabFact and "
                "WikiTQ the folder of the release with --tables"
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
        return [image for name in names for image in self.images.pages(str(name), where=where)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the kind."""
    add_parquet_options(parser, hub_id="ServiceNow/BigDocs-7.5M", configs=CONFIGS)
    parser.add_argument("--image-root", type=Path, help="folder of the images that rows name in img_id")
    parser.add_argument("--tables", type=Path, help="folder of TabFact's or WikiTableQuestions' release")
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
    if config in FROM_TABLES and split in ("val", "test") and not options.allow_benchmark_splits:
        raise ConfigError(
            f"--split {options.split}: the {split} split of {config} is a benchmark of the paper, training on it would "
            "void the score; use --split train, or --allow-benchmark-splits"
        )
    files = parquet_files(options)
    for file in files:
        if (named := _named_config(file.path)) and config not in PurePosixPath(file.path).parts:
            raise ConfigError(f"{file.path} is of config {named}, not {config}")
    images = _images(config, options.image_root, options.tables)
    return BigDocs(
        files=files,
        fetched=fetched_folder(options.out),
        images=images,
        source=options.source or f"bigdocs/{config}",
    )


def _named_config(place: str) -> str:
    return next((part for part in reversed(PurePosixPath(place).parts) if part in CONFIGS), "")


def _images(config: str, image_root: Path | None, tables: Path | None) -> NamedImages | None:
    """Return the source of named images of a config; raise ConfigError where an option does not fit it."""
    if config in WITH_IMAGES and (image_root or tables):
        raise ConfigError(f"{config} holds its images: remove --image-root and --tables")
    if tables is None:
        return ImageFolder(root=image_root, index=FolderIndex(image_root)) if image_root else None
    if config not in FROM_TABLES or image_root:
        raise ConfigError("--tables is for TabFact and WikiTQ, and --image-root does not go with it")
    if not tables.is_dir():
        raise ConfigError(f"--tables: there is no folder {tables}")
    release = WikiTables(folder=tables) if config == "WikiTQ" else FactTables(folder=tables)
    names = TableNames.from_names(release.names())
    if not names.whole:
        raise ConfigError(f"--tables: {tables} holds no tables of {config}; expected the folder of its release")
    return RenderedTables(names=names, release=release)
