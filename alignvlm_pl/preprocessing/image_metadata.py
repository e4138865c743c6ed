"""Image files without the metadata that decide nothing about pixels: texts, profiles, comments, further frames.

Pillow parses them, and refuses a valid image whose metadata are large or odd. Orientation (EXIF, XMP) is kept, within
limits. Nothing is unpacked beyond a limit, and what is skipped is not read.
"""

import os
import struct
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import IO

MAX_KEPT_BYTES = 1 << 20
"""Metadata with an orientation that are larger than this, packed or not, are skipped as well."""
_PNG = b"\x89PNG\r\n\x1a\n"
_JP2 = b"\0\0\0\x0cjP  \r\n\x87\n"
_JP2_BOXES = (b"jP  ", b"ftyp", b"jp2h", b"jp2c")
_PNG_ORIENTATION = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
_JPEG_ORIENTATION = (b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0")
_END_OF_FILE = 1 << 62


def essential_bytes(source: bytes | IO[bytes]) -> bytes:
    """Return an image file without needless metadata; a file of another or a broken form as it is.

    Args:
        source: The file's bytes, or the file, open for reading and seekable.
    """
    stream = BytesIO(source) if isinstance(source, bytes) else source
    start = stream.tell()
    head = stream.read(16)
    for magic, pieces in _READERS.items():
        if head.startswith(magic) and (magic != b"RIFF" or head[8:12] == b"WEBP"):
            stream.seek(start)
            try:
                return b"".join(pieces(stream))
            except (struct.error, IndexError):  # cut in its structure
                break
    stream.seek(start)
    return stream.read()


def _png(stream: IO[bytes]) -> Iterator[bytes]:
    """Yield the critical chunks and transparency of a PNG, and before its pixels those with an orientation.

    Of an animation the default image is left, which is the first frame.
    """
    yield stream.read(len(_PNG))
    before, pixels = b"", list[bytes]()
    while header := stream.read(8):
        size, kind = struct.unpack(">I4s", header)
        critical = not kind[0] & 0x20
        if critical or kind == b"tRNS" or (kind == b"eXIf" and size <= MAX_KEPT_BYTES):
            chunk = header + stream.read(size + 4)
        elif kind in (b"tEXt", b"zTXt", b"iTXt") and size <= MAX_KEPT_BYTES:
            chunk = header + stream.read(size + 4)
            chunk = chunk if _is_orientation(kind, chunk[8:-4]) else b""
        else:
            stream.seek(size + 4, os.SEEK_CUR)
            continue
        if critical or kind == b"tRNS":
            pixels.append(chunk)
        elif zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big"):
            before += chunk
        if kind == b"IEND":
            break
    first = next((number for number, chunk in enumerate(pixels) if chunk[4:8] == b"IDAT"), len(pixels))
    yield from (*pixels[:first], before, *pixels[first:])


def _is_orientation(kind: bytes, data: bytes) -> bool:
    """Whether a text chunk may hold an orientation, and unpacks within the limit."""
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


def _jpeg(stream: IO[bytes]) -> Iterator[bytes]:
    """Yield a JPEG without comments and application data, but for JFIF, Adobe's colour transform and orientation."""
    yield stream.read(2)
    while True:
        at = stream.tell()
        mark, kind, size = struct.unpack(">BBH", stream.read(4))
        known = 0xC0 <= kind <= 0xFE and not 0xD0 <= kind <= 0xD9
        if mark != 0xFF or not known or kind == 0xDA or size < 2:  # the scan begins, or something Pillow may know
            stream.seek(at)
            yield stream.read()
            return
        data = stream.read(size - 2)
        needed = {
            0xE0: data.startswith(b"JFIF\0") and len(data) >= 14,
            0xE1: data.startswith(_JPEG_ORIENTATION),
            0xEE: data.startswith(b"Adobe") and len(data) >= 12,
        }.get(kind, kind < 0xE0 or 0xF0 <= kind < 0xFE)
        if needed:
            yield struct.pack(">BBH", mark, kind, size) + data


def _gif(stream: IO[bytes]) -> Iterator[bytes]:
    """Yield a GIF without the comments, texts and application data before its first frame."""
    screen = stream.read(13)
    yield screen
    if screen[10] & 0x80:
        yield stream.read(3 << ((screen[10] & 7) + 1))
    while (mark := stream.read(2))[:1] == b"\x21":
        kept = mark[1] == 0xF9  # graphic control: transparency
        block = mark
        while size := stream.read(1):
            block = block + size + stream.read(size[0]) if kept else b""
            if not kept:
                stream.seek(size[0], os.SEEK_CUR)
            if size == b"\0":
                break
        yield block
    yield mark + stream.read()


def _webp(stream: IO[bytes]) -> Iterator[bytes]:
    """Yield a WebP without its colour profile, unknown chunks and large metadata."""
    kept = []
    head = stream.read(12)
    while len(header := stream.read(8)) == 8:
        kind, size = struct.unpack("<4sI", header)
        large = kind in (b"EXIF", b"XMP ") and size > MAX_KEPT_BYTES
        if large or kind not in (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF", b"EXIF", b"XMP "):
            stream.seek(size + size % 2, os.SEEK_CUR)
        else:
            kept.append(header + stream.read(size + size % 2))
    body = b"".join(kept)
    yield b"RIFF" + struct.pack("<I", 4 + len(body)) + head[8:] + body


def _jp2(stream: IO[bytes]) -> Iterator[bytes]:
    """Yield the boxes of a JPEG 2000 that hold header and pixels."""
    while len(header := stream.read(8)) == 8:
        size, kind = struct.unpack(">I4s", header)
        if size == 1:
            header += stream.read(8)
            size = struct.unpack(">Q", header[8:])[0]
        rest = (size or _END_OF_FILE) - len(header)
        if kind in _JP2_BOXES:
            yield header + (stream.read(rest) if size else stream.read())
        elif size:
            stream.seek(rest, os.SEEK_CUR)
        else:
            return


_READERS: dict[bytes, Callable[[IO[bytes]], Iterator[bytes]]] = {
    _PNG: _png,
    b"\xff\xd8": _jpeg,
    b"GIF8": _gif,
    b"RIFF": _webp,
    _JP2: _jp2,
}
