"""Members of a zip that lies anywhere, read by their place: its directory is read once, not in every process."""

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import PurePosixPath

from alignvlm_pl.errors import DataError

from ...shards.sample import SampleError
from ...storage.stored_files import StoredFile
from ...storage.stored_stream import StoredStream

MAX_MEMBER_BYTES = 1 << 30
"""Unpacked size above which a member is refused unread."""
_ENCRYPTED = 1
# APPNOTE.TXT 4.3.7: the header before a member ends with the lengths of its name and extra field.
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_LOCAL_MAGIC = b"PK\x03\x04"


@dataclass(frozen=True, kw_only=True, slots=True)
class ZipPlace:
    """Where a member lies and how it is packed.

    Attributes:
        offset: Byte of the zip at which its header begins.
        packed: Bytes that it takes.
        size: Bytes of its content.
        crc: CRC-32 of its content.
        method: Number of the compression.
        flags: General purpose flags.
    """

    offset: int
    packed: int
    size: int
    crc: int
    method: int
    flags: int


def read_directory(file: StoredFile) -> dict[str, ZipPlace]:
    """Return path -> place of the members of a zip; of several members of a path the last, as it is unpacked.

    Raises:
        DataError: It is no whole zip, or its store does not give it.
    """
    with StoredStream(file) as stream:
        try:
            with zipfile.ZipFile(io.BufferedReader(stream)) as archive:
                infos = archive.infolist()
        except DataError:
            raise
        except (
            zipfile.BadZipFile,
            EOFError,
            OSError,
            struct.error,
            ValueError,
            NotImplementedError,
        ) as error:
            raise DataError(
                f"{file.path} is no whole zip of {file.size} bytes ({type(error).__name__}: {error}); compare its size "
                "with what is published and fetch it again"
            ) from error
    return {
        str(PurePosixPath(info.filename)): ZipPlace(
            offset=info.header_offset,
            packed=info.compress_size,
            size=info.file_size,
            crc=info.CRC,
            method=info.compress_type,
            flags=info.flag_bits,
        )
        for info in infos
        if not info.is_dir()
    }


def read_member(stream: StoredStream, place: ZipPlace, *, where: str) -> bytes:
    """Return the content of a member.

    Raises:
        SampleError: It is encrypted, damaged, packed in an unknown way, or too large (``undecodable_image``).
        DataError: The store does not give it.
    """
    if place.flags & _ENCRYPTED:
        raise SampleError(f"{where} is encrypted in {stream.file.path}", "undecodable_image")
    if max(place.size, place.packed) > MAX_MEMBER_BYTES:
        raise SampleError(
            f"{where} would unpack to {place.size} bytes, expected at most {MAX_MEMBER_BYTES}",
            "undecodable_image",
        )
    try:
        return _unpacked(stream, place)
    except DataError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError) as error:
        raise SampleError(
            f"{where} is damaged in {stream.file.path} ({type(error).__name__}: {error})", "undecodable_image"
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
    # It unpacks `file_size` bytes at most and compares the checksum.
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
        raise EOFError("it goes on behind the end of the zip")
    return b"".join(pieces)
