"""`prepare llava`: LLaVA-558K (a JSON list and its images) or LLaVA-NeXT (parquet) -> globally shuffled shards.

The images of the list lie in a folder; the published zip is unpacked first: `unzip images.zip -d FOLDER`.
"""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignvlm_pl.errors import ConfigError

from ..shards.columns import LISTS, LLAVA
from ..shards.sample_formats import as_list
from ..storage.stored_files import list_files, list_folder
from .input_files import add_parquet_options, fetched_list, find_list, given_image_root, image_folder, parquet_files
from .pack.options import PackOptions
from .pack.work_folder import fetched_folder
from .sources.dialogues import read_conversation
from .sources.images import EncodedImage, ImageFolder, embedded_image, given_images
from .sources.json_files import RawRecord, is_list, raw_elements
from .sources.parquet_rows import ParquetRows
from .sources.record_files import RecordFile
from .sources.source import RawData, SourceSample


@dataclass(frozen=True, kw_only=True)
class LLaVAList(RecordFile):
    """The records of a JSON list, with images in a folder."""

    name: str = "llava"
    source: str = "llava"
    schema = LISTS

    def raw(self) -> Iterator[RawRecord]:
        return raw_elements(self.path)

    def convert(self, given: dict[str, Any], number: int, *, num_images: int, marked: bool) -> dict[str, Any]:
        name = given.get("id", number)
        return llava_record(given, num_images, default=self.source, name=name, where=self.where(number))


@dataclass(frozen=True, kw_only=True)
class LLaVARows(ParquetRows):
    """The rows of parquet files; rows without an image are text only."""

    name: str = "llava-next"
    source: str = "llava-next"
    license: str = "Apache-2.0"
    images: ImageFolder | None = None  # of rows that only name an image; None: such rows are invalid
    schema = LLAVA
    optional = ("image", "images", "data_source", "system", "video", "videos", "audio", "audios")

    def convert(self, row: Mapping[str, Any], columns: Mapping[str, str], *, where: str) -> SourceSample:
        # The hub writes a missing image as null, or as {bytes: null, path: null}.
        there = {
            name: [c for c in as_list(row.get(name)) if (any(c.values()) if isinstance(c, Mapping) else c is not None)]
            for name in ("image", "images")
        }
        cells = given_images(there, where=where)
        record = llava_record(row, len(cells), default=self.source, name=row[columns["id"]], where=where)
        return SourceSample(record=record, images=[_cell(cell, self.images, where) for cell in cells], where=where)


def llava_record(given: Mapping[str, Any], num_images: int, *, default: str, name: Any, where: str) -> dict[str, Any]:
    """Convert a record to the sample schema, or raise SampleError; `default` stands for a missing ``data_source``."""
    given = given if "messages" in given else {"conversations": None, **given}
    turns = read_conversation(given, num_images=num_images, where=where)["messages"]
    source = str(given.get("data_source") or default)
    return {"id": f"{source}/{name}", "source": source, "task": "instruction", "messages": turns}


def _cell(cell: Any, folder: ImageFolder | None, where: str) -> EncodedImage:
    if isinstance(cell, str) and folder is not None:
        return folder.read(cell, where=where)
    return embedded_image(cell, where=where, folder=folder)


_LIST = "blip_laion_cc_sbu_558k.json"
_ZIP = "images.zip"
_UNPACK = f"unzip {_ZIP} -d FOLDER"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the kind."""
    hub_id = "lmms-lab/LLaVA-NeXT-Data or liuhaotian/LLaVA-Pretrain; or LLaVA-558K's .json file"
    add_parquet_options(parser, hub_id=hub_id)
    parser.add_argument("--file", help=f"the list of a folder or dataset without parquet files (default: {_LIST})")
    parser.add_argument(
        "--image-root",
        type=Path,
        help=f"folder of the images that are only named, which {_UNPACK!r} fills (default: that of a list)",
    )


def open_source(options: argparse.Namespace) -> RawData:
    """Return the raw data, or raise ConfigError where an option does not fit the others."""
    place = options.input
    if place.lower().endswith((".json", ".jsonl")) or options.file or _is_list_set(place):
        return _list(options)
    root = given_image_root(options, unpack=_UNPACK)
    return LLaVARows(
        files=parquet_files(options),
        fetched=fetched_folder(options.out),
        images=ImageFolder(root=root) if root else None,
        source=options.source or "llava-next",
    )


def _is_list_set(place: str) -> bool:
    """Whether a folder or dataset holds a list: json files or the zip, and no parquet file anywhere."""
    if any(mark in place for mark in "*?["):
        return False
    names = [file.name for file in list_folder(place)]
    return any(name.lower().endswith(".json") or name == _ZIP for name in names) and not any(
        file.name.lower().endswith(".parquet") for file in list_files(place, "")
    )


def _list(options: argparse.Namespace) -> RawData:
    """Return the records of a list, with images of a folder."""
    file, beside = find_list(options, _LIST, expected=f"parquet files, or {_LIST} beside {_ZIP}")
    if file.name.lower().endswith(".jsonl") and not options.file and not (file.local and is_list(Path(file.path))):
        raise ConfigError(
            f"{file.path}: LLaVA's records are read from one JSON list (.json) or from parquet files; `prepare jsonl` "
            "reads lines of them"
        )
    if options.config or options.split:
        raise ConfigError(f"--config and --split choose parquet files, but {file.path} is one list")
    images = image_folder(options, file, beside, archive=_ZIP, unpack=_UNPACK)
    return LLaVAList(
        path=fetched_list(file, PackOptions.from_args(options)),
        image_root=images,
        origin="" if file.local else file.path,
        source=options.source or "llava",
    )
