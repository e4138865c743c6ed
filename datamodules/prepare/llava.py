"""`prepare llava`: LLaVA-558K (a JSON list and its images) or LLaVA-NeXT (parquet) -> globally shuffled shards.

The images of the list lie in a folder, or in the published zip, which is read where it is and not unpacked.
"""

import argparse
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from unicodedata import normalize

from alignvlm_pl.errors import ConfigError, DataError
from alignvlm_pl.preprocessing.images.source import describe_source
from alignvlm_pl.utils.text_files import HEAD_BYTES, content_kind

from ..shards.columns import LISTS, LLAVA
from ..shards.sample import SampleError
from ..shards.sample_formats import as_list
from ..storage.stored_files import StoredFile, StoredStream, find_file, list_files, list_folder
from .input_files import add_parquet_options, fetched_list, find_list, parquet_files
from .pack.options import PackOptions
from .sources.dialogues import read_conversation
from .sources.images import EncodedImage, ImageFolder, embedded_image, given_images, image_names
from .sources.json_files import RawRecord, is_list, parse_object, raw_elements
from .sources.parquet_rows import ParquetRows
from .sources.record_files import RecordFile
from .sources.source import Part, RawData, SourceSample, checked_image, or_error


@dataclass(frozen=True, kw_only=True)
class LLaVAList(RecordFile):
    """The records of a JSON list, with images in a folder."""

    name: str = "llava"
    source: str = "llava"
    schema = LISTS

    def raw(self, *place: int) -> Iterator[RawRecord]:
        return raw_elements(self.path, *place)

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

    def sample(self, row: Mapping[str, Any], columns: Mapping[str, str], *, where: str) -> SourceSample:
        # The hub writes a missing image as null, or as {bytes: null, path: null}.
        there = {
            name: [c for c in as_list(row.get(name)) if (any(c.values()) if isinstance(c, Mapping) else c is not None)]
            for name in ("image", "images")
        }
        cells = given_images(there, where=where)
        record = llava_record(row, len(cells), default=self.source, name=row[columns["id"]], where=where)
        return SourceSample(record=record, images=[_cell(cell, self.images, where) for cell in cells])


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


MAX_MEMBER_BYTES = 1 << 30
"""Unpacked size above which a member is refused unread."""
_ENCRYPTED = 1
# APPNOTE.TXT 4.3.7: the header before a member ends with the lengths of its name and extra field.
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_LOCAL_MAGIC = b"PK\x03\x04"


class ZipPlace(NamedTuple):
    """Place and compression of a member of a zip."""

    offset: int  # byte of the zip at which its header begins
    packed: int  # bytes of its compressed content
    size: int  # bytes of its content
    crc: int  # CRC-32 of its content
    method: int  # number of the compression
    flags: int  # general purpose flags


def read_directory(file: StoredFile) -> dict[str, ZipPlace]:
    """Return path -> place of the members of a zip, or raise DataError; the last of several with one path counts."""
    with StoredStream(file) as stream:
        try:
            with zipfile.ZipFile(io.BufferedReader(stream)) as archive:
                infos = archive.infolist()
        except DataError:
            raise
        except (zipfile.BadZipFile, EOFError, OSError, struct.error, ValueError, NotImplementedError) as error:
            found = f"{_first_bytes(file)}{type(error).__name__}: {error}"
            raise DataError(
                f"{file.path} is no whole zip of {file.size} bytes ({found}); "
                "compare its size with what is published and fetch it again"
            ) from error
    return {
        str(PurePosixPath(info.filename.replace("\\", "/"))): ZipPlace(  # as some programs of Windows write it
            info.header_offset, info.compress_size, info.file_size, info.CRC, info.compress_type, info.flag_bits
        )
        for info in infos
        if not info.is_dir()
    }


def _first_bytes(file: StoredFile) -> str:
    """Return what a file that is no zip is; empty where that is not known, or a zip that is cut."""
    with StoredStream(file) as stream:
        kind = content_kind(stream.read(HEAD_BYTES))
    return f"it is {kind}; " if kind and not kind.startswith("zip") else ""


def read_member(stream: StoredStream, place: ZipPlace, *, where: str) -> bytes:
    """Return the content of a member.

    Raises:
        SampleError: It is encrypted, damaged, of unknown compression, or too large (``undecodable_image``).
    """
    if place.flags & _ENCRYPTED:
        raise SampleError(f"{where} is encrypted in {stream.place[0].path}", "undecodable_image")
    if max(place.size, place.packed) > MAX_MEMBER_BYTES:
        raise SampleError(
            f"{where} would unpack to {place.size} bytes, expected at most {MAX_MEMBER_BYTES}", "undecodable_image"
        )
    try:
        return _unpacked(stream, place)
    except DataError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError) as error:
        raise SampleError(
            f"{where} is damaged in {stream.place[0].path} ({type(error).__name__}: {error})", "undecodable_image"
        ) from error


def _unpacked(stream: StoredStream, place: ZipPlace) -> bytes:
    stream.seek(place.offset)
    magic, name_length, extra_length = _LOCAL_HEADER.unpack(_exactly(stream, _LOCAL_HEADER.size))
    if magic != _LOCAL_MAGIC:
        raise zipfile.BadZipFile(f"no member begins at byte {place.offset}")
    stream.seek(name_length + extra_length, io.SEEK_CUR)
    info = zipfile.ZipInfo()
    info.compress_type, info.compress_size = place.method, place.packed
    info.file_size, info.CRC = place.size, place.crc
    packed = io.BytesIO(_exactly(stream, place.packed))
    # Unpacks at most `file_size` bytes and compares the checksum.
    with zipfile.ZipExtFile(packed, "r", info) as member:
        data: bytes = member.read()
    if len(data) != place.size:
        raise EOFError(f"it ends after {len(data)} of {place.size} bytes")
    return data


def _exactly(stream: StoredStream, size: int) -> bytes:
    pieces = []
    while size > 0 and (piece := stream.read(size)):
        pieces.append(piece)
        size -= len(piece)
    if size > 0:
        raise EOFError("it ends beyond the end of the zip")
    return b"".join(pieces)


_PART_RECORDS = 2048


@dataclass(frozen=True, kw_only=True)
class LLaVAZip(LLaVAList):
    """Records in the order in which a zip holds their first images.

    The names of its members are the records' paths, or those below one folder named as the zip is.
    """

    zip: StoredFile

    @property
    def folder(self) -> ImageFolder:
        """Folder of the zip, which absolute paths of records lie below."""
        return ImageFolder(root=Path(self.zip.path).parent)

    def parts(self) -> list[Part]:
        """Return a part for each few thousand records.

        Raises:
            DataError: The list is no JSON list, of another schema, or names no image of the zip, or that is no zip.
        """
        self.check()
        members = read_directory(self.zip)
        rows = [
            (number, at, at + len(text), [self._place(path, members) for path in _paths(text)])
            for number, at, text in self.raw()
        ]
        named = next((path for _, _, text in self.raw() for path in _paths(text) if self._name(path)), None)
        if named and not any(place for *_, places in rows for place in places):
            raise DataError(
                f"{self.zip.path} holds none of the images of {self.label}: expected such as "
                f"{named!r}, found such as {next(iter(members), 'no file')!r}"
            )
        # The images of a part are contiguous in the zip, which it reads forward.
        rows.sort(key=lambda row: (row[3][0][0] if row[3] and row[3][0] else -1, row[0]))
        pieces = [rows[at : at + _PART_RECORDS] for at in range(0, len(rows), _PART_RECORDS)]
        # One text: parts hold plain values.
        return [
            Part(name=f"{self.path.name}#{number}", payload=(json.dumps(piece),), rows=len(piece))
            for number, piece in enumerate(pieces)
        ]

    def _name(self, path: str) -> str | None:
        """Return the path of an image below the folder of the zip; None for one that is not below it."""
        try:
            return str(self.folder.relative(path, where=""))
        except SampleError:
            return None

    def _place(self, path: str, members: Mapping[str, ZipPlace]) -> ZipPlace | None:
        """Return the place of an image among the members of the zip; None for a missing one."""
        if (name := self._name(path)) is None:
            return None
        stem = Path(self.zip.name).stem
        inner = name.removeprefix(f"{stem}/")  # of an absolute path below the unpacked zip
        forms = [normalize(form, path) for path in (name, f"{stem}/{name}", inner) for form in ("NFC", "NFD")]
        return next((members[form] for form in (name, *forms) if form in members), None)

    def input_bytes(self) -> int:
        return self.path.stat().st_size + self.zip.size

    def spool_bytes(self) -> int:
        return self.input_bytes()

    def read(self, part: Part) -> Iterator[SourceSample | SampleError]:
        with self.path.open("rb") as records, closing(StoredStream(self.zip)) as images:
            for number, start, end, places in json.loads(part.payload[0]):
                records.seek(start)
                yield or_error(self._sample, records.read(end - start), number, places, images)

    def _sample(self, text: bytes, number: int, places: list[list[int] | None], images: StoredStream) -> SourceSample:
        record, paths = self.parse(text, number) or ({}, [])
        found: list[EncodedImage] = []
        for path, place in zip(paths, places, strict=True):
            self.folder.relative(path, where=self.where(number))
            label = f"{self.where(number)}: image {describe_source(path)}"
            if place is None:
                raise SampleError(f"{label} is not in {self.zip.path}", "missing_image")
            found.append(checked_image(read_member(images, ZipPlace(*place), where=label), label))
        return SourceSample(record=record, images=found)


def _paths(record: bytes) -> list[str]:
    """Return the paths of the images of a record; an invalid one is counted when it is read."""
    try:
        return image_names(parse_object(record, where=""), where="")
    except SampleError:
        return []


_LIST = "blip_laion_cc_sbu_558k.json"
_ZIP = "images.zip"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the kind."""
    hub_id = "lmms-lab/LLaVA-NeXT-Data or liuhaotian/LLaVA-Pretrain; or LLaVA-558K's .json file"
    add_parquet_options(parser, hub_id=hub_id)
    parser.add_argument("--file", help=f"the list of a folder or dataset without parquet files (default: {_LIST})")
    parser.add_argument(
        "--image-root",
        help="folder of the images that are only named, or for a list a .zip, which may be an address (default: "
        f"{_ZIP} in the same folder or dataset, or else the list's folder)",
    )


def open_source(options: argparse.Namespace) -> RawData:
    """Return the raw data, or raise ConfigError where an option does not fit the others."""
    place, root = options.input, options.image_root
    if place.lower().endswith((".json", ".jsonl")) or options.file or _is_list_set(place):
        return _list(options)
    if _is_zip(root):
        raise ConfigError(f"--image-root {root}: images of parquet rows are read from a folder; unpack it")
    return LLaVARows(
        files=parquet_files(options),
        images=ImageFolder(root=Path(root)) if root else None,
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
    """Return the records of a list, with images of a folder or a zip, by default the zip beside it."""
    file, beside = find_list(options, _LIST, expected=f"parquet files, or {_LIST} beside {_ZIP}")
    if file.name.lower().endswith(".jsonl") and not options.file and not (file.local and is_list(Path(file.path))):
        raise ConfigError(
            f"{file.path}: LLaVA's records are read from one JSON list (.json) or from parquet files; `prepare jsonl` "
            "reads lines of them"
        )
    if options.config or options.split:
        raise ConfigError(f"--config and --split choose parquet files, but {file.path} is one list")
    root = options.image_root
    zipped = next((file for file in beside if file.name == _ZIP), None)
    if root:
        zipped = find_file(root) if _is_zip(root) else None
    elif not zipped and not file.local:
        raise ConfigError(
            f"{file.path} does not lie on this disk and no {_ZIP} is in its dataset; name its images with --image-root"
        )
    path = fetched_list(file, PackOptions.from_args(options))
    origin, source = "" if file.local else file.path, options.source or "llava"
    if zipped:
        return LLaVAZip(path=path, zip=zipped, origin=origin, source=source)
    return LLaVAList(path=path, image_root=Path(root) if root else path.parent, origin=origin, source=source)


def _is_zip(root: str | None) -> bool:
    return root is not None and root.lower().endswith(".zip")
