"""`prepare bigdocs`: one config of BigDocs-7.5M -> shards, shuffled once for all.

ArxivOCR, ArxivTableCap and cord-v2 hold their pictures. COCOtext, pubtables-1m, TextOCR and Open4Business name them:
give their folder with --image-root. TabFact and WikiTQ name tables: give the release with --tables, and they are drawn.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from alignvlm_pl.errors import ConfigError

from ..storage.stored_files import StoredFile, canonical_split
from .files_options import DEFAULT_SPLIT, add_parquet_options, parquet_files
from .pack.command import add_options, pack, print_yield
from .rendered_tables import tabfact, wtq
from .rendered_tables.source import RenderedTables
from .rendered_tables.table_questions import TableNames
from .sources.bigdocs import CONFIGS, FROM_TABLES, WITH_PICTURES, BigDocs, NamedPictures
from .sources.pictures import PictureFolder


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="prepare bigdocs", description=__doc__, allow_abbrev=False)
    add_parquet_options(parser, hub_id="ServiceNow/BigDocs-7.5M")
    parser.add_argument("--config", choices=CONFIGS, help="default: the one that the files' folder is called")
    parser.add_argument("--image-root", type=Path, help="folder of the pictures that rows name in img_id")
    parser.add_argument("--tables", type=Path, help="folder of TabFact's or WikiTableQuestions' release")
    parser.add_argument(
        "--allow-benchmark-splits",
        action="store_true",
        help="take validation and test rows of TabFact and WikiTQ, on which models are compared",
    )
    add_options(parser)
    options = parser.parse_args(list(argv))
    config = options.config or _named_config(options.input)
    if config in FROM_TABLES and not options.allow_benchmark_splits:
        _refuse(config, options.split or DEFAULT_SPLIT)
    files = parquet_files(options, config=config)
    _check_config(files, config)
    raw = BigDocs(
        files=files,
        pictures=_pictures(config, options.image_root, options.tables),
        source=options.source or f"bigdocs/{config}",
    )
    print_yield(pack(raw, options))
    return 0


def _named_config(place: str) -> str:
    named = [part for part in PurePosixPath(place).parts if part in CONFIGS]
    if not named:
        raise ConfigError(
            f"{place} does not say which config it is: name it with --config ({', '.join(CONFIGS)})"
        )
    return named[-1]


def _check_config(files: Sequence[StoredFile], config: str) -> None:
    """Refuse files that are another config's."""
    for file in files:
        named = [part for part in PurePosixPath(file.path).parts if part in CONFIGS]
        if named and config not in named:
            raise ConfigError(f"{file.path} is of config {named[-1]}, not {config}")


def _refuse(config: str, split: str) -> None:
    # CONTRACT: `choose_files` gives no file whose name says another split.
    if (meant := canonical_split(split)) in ("val", "test"):
        raise ConfigError(
            f"--split {split}: the {meant} split of {config} is a benchmark of the paper, training on it would void "
            "the score; take --split train, or say --allow-benchmark-splits"
        )


def _pictures(config: str, image_root: Path | None, tables: Path | None) -> NamedPictures | None:
    """Return where the pictures of a config lie.

    Raises:
        ConfigError: An option does not fit the config, or its folder is not there.
    """
    if config in WITH_PICTURES and (image_root or tables):
        raise ConfigError(f"{config} holds its pictures: leave out --image-root and --tables")
    if tables is None:
        return PictureFolder.indexed(image_root) if image_root else None
    if config not in FROM_TABLES or image_root:
        raise ConfigError("--tables is for TabFact and WikiTQ, and --image-root does not go with it")
    if not tables.is_dir():
        raise ConfigError(f"--tables: there is no folder {tables}")
    module = wtq if config == "WikiTQ" else tabfact
    names = TableNames.of(module.table_names(tables))
    if not names.whole:
        raise ConfigError(
            f"--tables: {tables} holds no tables of {config}; expected the folder of its release"
        )
    return RenderedTables(names=names, load=module.all_tables(tables))
