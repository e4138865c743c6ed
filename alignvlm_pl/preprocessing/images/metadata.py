"""Image files without the metadata that decide nothing about pixels, which Pillow parses, and may refuse an image for.

Orientation (EXIF, XMP) is kept, within limits. Nothing is unpacked beyond a limit, and what is skipped is not read.
"""

import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from typing import IO

MAX_KEPT_BYTES = 1 << 20  # Metadata with an orientation that are larger than this, packed or not, are skipped as well
_PNG = b"\x89PNG\r\n\x1a\n"
_JP2 = b"\0\0\0\x0cjP  \r\n\x87\n"
_JP2_BOXES = (b"jP  ", b"ftyp", b"jp2h", b"jp2c")
_PNG_ORIENTATION = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
_JPEG_ORIENTATION = (b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0")
_MAGIC = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")
Piece = bytes | tuple[int, int]  # Bytes, or the first byte of a range of the file and the byte after its last


def is_image_head(head: bytes) -> bool:
    """Return whether the first 16 bytes of a file are those of an image, be it of an unknown format (HEIC)."""
    marked = head[8:12] == b"WEBP" or (head[4:8] == b"ftyp" and head[8:11] in (b"avi", b"hei", b"mif"))
    return head.startswith(_MAGIC) or marked or (head[:2] == b"BM" and head[6:10] == bytes(4))


def essential_bytes(source: bytes | IO[bytes]) -> bytes:
    """Return an image file, given as bytes or open and seekable, without needless metadata; any other as it is."""
    stream = BytesIO(source) if isinstance(source, bytes) else source
    head = stream.read(16)
    found = next((pieces for magic, pieces in _READERS.items() if head.startswith(magic)), None)
    if found is not None:
        stream.seek(0)
        try:
            kept = _joined(found(stream))
            if kept != [(0, stream.seek(0, os.SEEK_END))]:  # else the file has nothing needless
                return b"".join(piece if isinstance(piece, bytes) else _read(stream, piece) for piece in kept)
        except (struct.error, IndexError):  # cut in its structure
            pass
    stream.seek(0)
    return source if isinstance(source, bytes) else stream.read()


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    kept: list[Piece] = []
    for piece in pieces:
        last = kept[-1] if kept else b""
        if isinstance(piece, tuple) and isinstance(last, tuple) and last[1] == piece[0]:
            kept[-1] = (last[0], piece[1])
        elif piece:
            kept.append(piece)
    return kept


def _read(stream: IO[bytes], piece: tuple[int, int]) -> bytes:
    stream.seek(piece[0])
    return stream.read(piece[1] - piece[0])


def _rest(stream: IO[bytes], start: int) -> tuple[int, int]:
    return start, max(start, stream.seek(0, os.SEEK_END))


def _png(stream: IO[bytes]) -> Iterator[Piece]:
    """Yield the critical chunks and transparency of a PNG (of an animation its first frame), an orientation first."""
    start, pixels, before, late = len(_PNG), list[Piece](), list[Piece](), list[Piece]()
    kind = b""
    while kind != b"IEND" and len(header := _read(stream, (start, start + 8))) == 8:
        size, kind = struct.unpack(">I4s", header)
        chunk, start = (start, start + size + 12), start + size + 12
        if not kind[0] & 0x20 or kind == b"tRNS":
            (pixels if pixels or kind == b"IDAT" else before).append(chunk)
        elif kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt") and size <= MAX_KEPT_BYTES:
            data = _read(stream, chunk)
            if zlib.crc32(data[4:-4]) == int.from_bytes(data[-4:], "big") and _is_orientation(kind, data[8:-4]):
                (late if pixels else before).append(chunk)
    yield (0, len(_PNG))
    yield from (*before, *late, *pixels)
    if kind != b"IEND":
        yield _rest(stream, start)


def _is_orientation(kind: bytes, data: bytes) -> bool:
    """Whether a chunk may hold an orientation, and unpacks within the limit."""
    if kind == b"eXIf":
        return True
    name = next((name for name in _PNG_ORIENTATION if data.startswith(name)), None)
    if name is None:
        return False
    rest = data[len(name) :]
    if kind == b"iTXt" and rest[:1] == b"\1":
        packed = rest[2:].split(b"\0", 2)[-1]
    elif kind == b"zTXt":
        packed = rest[1:]
    else:
        return True
    unpack = zlib.decompressobj()
    try:
        unpack.decompress(packed, MAX_KEPT_BYTES)
    except zlib.error:
        return False
    return not unpack.unconsumed_tail


def _jpeg(stream: IO[bytes]) -> Iterator[Piece]:
    """Yield a JPEG without comments and application data, but for JFIF, Adobe's colour transform and orientation."""
    yield (0, 2)
    start = 2
    while True:
        mark, kind, size = struct.unpack(">BBH", _read(stream, (start, start + 4)))
        known = 0xC0 <= kind <= 0xFE and not 0xD0 <= kind <= 0xD9
        if mark != 0xFF or not known or kind == 0xDA or size < 2:  # the scan begins, or something Pillow may know
            yield _rest(stream, start)
            return
        head = _read(stream, (start + 4, start + 36))
        needed = {
            0xE0: head.startswith(b"JFIF\0") and size >= 16,
            0xE1: head.startswith(_JPEG_ORIENTATION),
            0xEE: head.startswith(b"Adobe") and size >= 14,
        }.get(kind, kind < 0xE0 or 0xF0 <= kind < 0xFE)
        if needed:
            yield (start, start + 2 + size)
        start += 2 + size


def _gif(stream: IO[bytes]) -> Iterator[Piece]:
    """Yield a GIF without the comments, texts and application data before its first frame."""
    flags = _read(stream, (0, 13))[10]
    start = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    yield (0, start)
    while (mark := _read(stream, (start, start + 2)))[:1] == b"\x21":
        end = start + 2
        while size := _read(stream, (end, end + 1))[0]:
            end += 1 + size
        if mark[1] == 0xF9:  # graphic control: transparency
            yield (start, end + 1)
        start = end + 1
    yield _rest(stream, start)


def _webp(stream: IO[bytes]) -> Iterator[Piece]:
    """Yield a WebP without its colour profile, unknown chunks and large metadata."""
    head = _read(stream, (0, 12))
    end = 8 + int.from_bytes(head[4:8], "little")
    start, kept = 12, list[tuple[int, int]]()
    while start < end and len(header := _read(stream, (start, start + 8))) == 8:
        kind, size = struct.unpack("<4sI", header)
        chunk, start = (start, start + 8 + size + size % 2), start + 8 + size + size % 2
        small = kind in (b"EXIF", b"XMP ") and size <= MAX_KEPT_BYTES
        if small or kind in (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF"):
            kept.append(chunk)
    if head[8:] != b"WEBP" or _joined(kept) == [(12, end)]:
        yield _rest(stream, 0)
        return
    yield b"RIFF" + struct.pack("<I", 4 + sum(chunk[1] - chunk[0] for chunk in kept)) + b"WEBP"
    yield from kept


def _jp2(stream: IO[bytes]) -> Iterator[Piece]:
    """Yield the boxes of a JPEG 2000 that hold header and pixels."""
    start = 0
    while len(header := _read(stream, (start, start + 16))) >= 8:
        size, kind = struct.unpack(">I4s", header[:8])
        if size == 1:
            size = struct.unpack(">Q", header[8:])[0]
        box = (start, start + size) if size else _rest(stream, start)
        if kind in _JP2_BOXES:
            yield box
        if size < 8:  # the last box, or a broken one
            return
        start = box[1]


_READERS: dict[bytes, Callable[[IO[bytes]], Iterator[Piece]]] = {
    _PNG: _png,
    b"\xff\xd8": _jpeg,
    b"GIF8": _gif,
    b"RIFF": _webp,
    _JP2: _jp2,
}
